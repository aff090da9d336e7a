"Rows A50, A51 and A53 of the sources: ranks and non-Gaussianity of what the units of a layer say."
import math

import pytest
import torch
from scipy import stats

from lop_nb.normality import non_gaussianity
from lop_nb.ranks import effective_rank, participation_ratio, spectrum, stable_rank

def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_A50_effective_rank():
    "exp of the entropy of the uncentred singular values: 1 for rank one, D for the identity, 0 for nothing; the theory's two others, of the centred layer and of its covariance, by name (DA17)"
    u, v = normal(50, 1), normal(1, 30, seed=1)
    assert effective_rank(u @ v) == pytest.approx(1) and effective_rank(torch.eye(30)) == pytest.approx(30) and effective_rank(torch.zeros(50, 30)) == 0
    h = (normal(500, 40) @ normal(40, 60, seed=1)).relu(); c = h - h.mean(0)
    for ours, values in ((effective_rank(h), torch.linalg.svdvals(h)), (effective_rank(h, centred=True), torch.linalg.svdvals(c)), (effective_rank(h, centred=True, squared=True), torch.linalg.eigvalsh(c.T @ c))):
        p = values.clamp(0)/values.sum(); assert ours.item() == pytest.approx(math.exp(-sum(v*math.log(v + 1e-12) for v in p.tolist())), rel=1e-6)
    assert len({round(r.item()) for r in (effective_rank(h), effective_rank(h, centred=True), effective_rank(h, centred=True, squared=True))}) == 3


def test_A51_stable_rank_and_participation_ratio():
    "What the source's code computes as stable rank is the participation ratio of the covariance; what its README says is the squared Frobenius over the squared spectral norm: both, under their names (DA16)"
    h = (normal(500, 40) @ normal(40, 60, seed=1)).relu(); c = h - h.mean(0)
    as_coded = c.square().sum()**2/(c.T @ c).square().sum()
    assert participation_ratio(h).item() == pytest.approx(as_coded.item(), rel=1e-10)
    for centred, m in ((False, h), (True, c)):
        assert stable_rank(h, centred).item() == pytest.approx((torch.linalg.matrix_norm(m)**2/torch.linalg.matrix_norm(m, 2)**2).item(), rel=1e-10)
    assert participation_ratio(h) > 1.5*stable_rank(h, centred=True)
    built = torch.linalg.qr(normal(60, 3))[0]*torch.tensor([3., 2., 1.], dtype=torch.float64)     # σ² = 9, 4, 1
    assert stable_rank(built).item() == pytest.approx(14/9) and participation_ratio(built, centred=False).item() == pytest.approx(14**2/98) and spectrum(built).tolist() == pytest.approx([3, 2, 1])


@pytest.mark.parametrize("kind, of_normal, of_uniform, most", [("shapiro", (.0005, .004), (.04, .05), 1), ("ks", (.01, .03), (.06, .075), 1), ("anderson", (.4, .7), (9.5, 10), 10), ("kurtosis", (.05, .2), (1.15, 1.25), 10)])
def test_A53_non_gaussianity(kind, of_normal, of_uniform, most):
    "Four rulers, on at most 1,000 rows, averaged over the units: about .002, .02, .5 and .1 for normal samples, .045, .066 and 1.2 for uniform ones; constants are 1, or 10; the statistic is SciPy's"
    h = normal(1000, 100); uniform = torch.rand(1000, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert of_normal[0] < non_gaussianity(h, kind) < of_normal[1] and of_uniform[0] < non_gaussianity(uniform, kind) <= of_uniform[1]
    assert non_gaussianity(torch.full((1000, 3), .1), kind) == most == non_gaussianity(torch.zeros(1000, 3), kind)
    assert torch.equal(non_gaussianity(normal(5000, 10), kind), non_gaussianity(normal(5000, 10)[::5], kind))
    scipys = dict(shapiro=lambda u: 1 - stats.shapiro(u).statistic, ks=lambda u: stats.kstest((u - u.mean())/u.std(ddof=1), "norm").statistic, kurtosis=lambda u: abs(stats.kurtosis(u)))
    if kind in scipys: assert non_gaussianity(h, kind).item() == pytest.approx(sum(scipys[kind](u) for u in h.T.numpy())/100, abs=1e-8)
