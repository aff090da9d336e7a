"What the tests of measures compare with, and on what."
import numpy as np, pytest, torch

EPS = {torch.float32: 1e-5, torch.float64: 1e-12}     # relative, written before the run
dtypes = pytest.mark.parametrize("dtype", EPS)

def close(a, b, eps): np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=eps, atol=eps)
def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
