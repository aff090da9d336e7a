"Rows A46, A54 and A55 of the sources: which layers, histograms in the records, and when it is measured."
from functools import partial

import pytest

from lop_nb.compose import compose
from lop_nb.config import Adam
from lop_nb.data import load
from lop_nb.experiments import make_network, make_callbacks
from lop_nb.learner import Learner
from lop_nb.models import MLP
from lop_nb.monitor import Monitor, select
from lop_nb.replicas import Replicas
from lop_nb.streams import ClassSplit

DATA = load("digits", examples_per_class=20)
SMALL = partial(MLP, 64, 10, hidden_sizes=[12, 12], normalization="none", dropout_p=0.)


@pytest.mark.parametrize("words, outputs", [([], ["act_0", "act_1", "act_2"]), (["model=cnn", "model.conv_channels=[4,8]"], ["act_0", "act_1", "fc_act_0"]),
    (["model=resnet", "model.layers=[2,1]"], ["layer1_block0", "layer1_block1", "layer2_block0"]), (["model=vit", "model.patch_size=4", "model.depth=2"], ["block_0", "block_1"])])
def test_A46_presets_of_layers(words, outputs):
    "`metrics=default`, `all` and `block_outputs` find something on each of the four networks: units, every module, whole blocks"
    found = {}
    for preset in ("default", "all", "block_outputs"):
        cfg = compose([*words, f"metrics={preset}"]); net = make_network(cfg, (1, 8, 8), 10)
        found[preset] = select(net, cfg.metrics.layers)
    assert found["block_outputs"] == outputs and set(outputs) <= set(found["all"])
    assert 0 < len(found["default"]) < len(found["all"]) and set(found["default"]) < set(found["all"])


def test_A54_statistics_and_histograms_are_recorded():
    "`log_activation_histograms`: act_means_hist and act_stds_hist of each layer, a row a bin, shares of its units; mean_of_means, std_of_means, mean_of_stds, std_of_stds as measures"
    four = ["mean_of_means", "std_of_means", "mean_of_stds", "std_of_stds"]
    cfg = compose([f"metrics.names=[{','.join(four)}]", "metrics.log_activation_histograms=true"])
    (monitor,) = [c for c in make_callbacks(cfg, "backprop") if isinstance(c, Monitor)]
    df = Learner(Replicas(SMALL, [0, 1]), ClassSplit(DATA, tasks=1), Adam(), epochs=1, callbacks=[monitor]).fit().records.query("layer != ''")
    for layer in ("act_0", "act_1"):
        own = df[df.layer == layer]
        assert set(four) <= set(own.metric)
        for key in ("act_means_hist[", "act_stds_hist["):
            assert own[own.metric.str.startswith(key)].groupby("seed").value.sum().tolist() == pytest.approx([1, 1])
    off = make_callbacks(compose([]), "backprop")
    assert not any(c.histograms for c in off if isinstance(c, Monitor))


def test_A55_every_fifth_epoch_and_the_first_and_last():
    "`metrics_frequency=5` in tasks of 18 and of 20 epochs: epochs 0, 5, 10, 15 and the last, once each"
    for epochs in (18, 20):
        cfg = compose(["metrics.metrics_frequency=5", "metrics.names=[dead_fraction]"])
        monitor = Monitor(list(cfg.metrics.names), epochs=cfg.metrics.epochs, probe_size=20)
        df = Learner(Replicas(SMALL, [0]), ClassSplit(DATA, tasks=2), Adam(), epochs=epochs, batch_size=64, callbacks=[monitor], defaults=()).fit().records
        assert df.query("layer == 'act_0'").groupby("task").epoch.apply(list).tolist() == [[0, 5, 10, 15, epochs]]*2
