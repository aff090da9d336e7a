"The choice among several CUDA cards, on a machine that is made up: a driver's library, and what CUDA shows of its cards."
import sys
import types

import pytest
import torch

from lop_nb.runtime import LopError, card_score, card_scores, pick_device

GB = 2**30


class Card:
    "A card as its driver knows it: name, place on the bus, memory, how busy, processes; None: it does not tell"
    def __init__(self, uuid, bus, free, total=80*GB, busy=0, processes=(), kind="GPU"):
        self.uuid, self.bus, self.free, self.total, self.busy, self.processes, self.kind = uuid, bus, free, total, busy, processes, kind

    @property
    def name(self): return f"{self.kind}-{self.uuid}"


A = Card("aaaa1111-0000", 0x07, 70*GB, busy=100, processes=(1,))          # .525 + 0   + .05 = .575
B = Card("bbbb2222-0000", 0x0f, 8*GB)                                     # .06  + .3  + .1  = .46
C = Card("bbcc3333-0000", 0x47, 60*GB, busy=10, processes=(1, 2, 3))      # .45  + .27 + .025 = .745
D = Card("dddd4444-0000", 0x90, 60*GB, busy=30, processes=())             # .45  + .21 + .1  = .76
MACHINE = [A, B, C, D]                                                    # in NVML's order, which is that of the bus
SCORES = {A: .575, B: .46, C: .745, D: .76}


def visible(variable, cards, order=None):
    "What CUDA shows of the machine: the rules of CUDA_VISIBLE_DEVICES"
    cards = order or cards
    if variable is None: return cards
    named = lambda w: next(c for c in cards if c.name.startswith(w))
    return [named(w) if w.startswith(("GPU-", "MIG-")) else cards[int(w)] for w in variable.split(",")]


@pytest.fixture
def machine(monkeypatch):
    "machine(shown, cards): from now on there are `cards`, and torch sees `shown` of them"
    def build(shown, cards=MACHINE, nvml=True):
        properties = lambda i: types.SimpleNamespace(uuid=shown[i].uuid, pci_domain_id=0, pci_bus_id=shown[i].bus, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(shown))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (shown[i].free, shown[i].total))
        library = driver(cards) if nvml else None
        monkeypatch.setitem(sys.modules, "pynvml", library)   # None: the import fails
        return library
    return build


def driver(cards):
    "A stand-in for pynvml"
    lib = types.ModuleType("pynvml"); lib.open = lib.asked = 0
    class NVMLError(Exception): pass
    def find(wanted):
        found = [c for c in cards if wanted(c)]
        if not found: raise NVMLError("Not Found")
        return found[0]
    def told(v):
        if v is None: raise NVMLError("Not Supported")
        return v
    def count(n): lib.open += n; lib.asked += n == 1
    lib.NVMLError = NVMLError
    lib.nvmlInit, lib.nvmlShutdown = lambda: count(1), lambda: count(-1)
    lib.nvmlDeviceGetHandleByUUID = lambda name: find(lambda c: c.name == name)
    lib.nvmlDeviceGetHandleByPciBusId = lambda address: find(lambda c: address == f"00000000:{c.bus:02x}:00.0")
    lib.nvmlDeviceGetMemoryInfo = lambda c: types.SimpleNamespace(free=c.free, total=c.total)
    lib.nvmlDeviceGetUtilizationRates = lambda c: types.SimpleNamespace(gpu=told(c.busy))
    lib.nvmlDeviceGetComputeRunningProcesses = lambda c: list(told(c.processes))
    return lib


@pytest.mark.parametrize("variable, best", [
    (None, 3), ("2,0", 0), ("0,2", 1), ("3,1,2", 0), ("1,0", 1), ("GPU-dddd,GPU-aaaa1111", 0), ("GPU-aaaa1111-0000,GPU-bbcc,GPU-bbbb", 1)])
def test_the_highest_score_as_torch_counts(machine, variable, best):
    shown = visible(variable, MACHINE); library = machine(shown)
    assert card_scores() == pytest.approx([SCORES[c] for c in shown], abs=1e-12)
    assert pick_device() == torch.device(f"cuda:{best}")
    assert library.open == 0, "the library is left open"


def test_cuda_may_count_the_fastest_first(machine):
    "without CUDA_VISIBLE_DEVICES torch's order need not be the bus's either"
    machine(visible(None, MACHINE, order=[D, A, C, B]))
    assert pick_device() == torch.device("cuda:0")


def test_slices_of_a_card(machine):
    "MIG slices have names of their own, and do not say how busy they are"
    small, large = Card("eeee0001", 0x90, 5*GB, 10*GB, None, None, "MIG"), Card("eeee0002", 0x90, 18*GB, 20*GB, None, None, "MIG")
    machine([small, large], [A, small, large])
    assert card_scores() == pytest.approx([.3 + .3 + .1, .54 + .3 + .1])
    assert pick_device() == torch.device("cuda:1")


def test_a_card_without_a_known_name_is_found_on_the_bus(machine):
    shown = [Card("not what the driver says", c.bus, 0) for c in (B, D)]
    machine(shown)
    assert card_scores() == pytest.approx([SCORES[B], SCORES[D]])


def test_equal_scores_go_to_the_first(machine):
    twins = [Card(f"t{i}", i, 40*GB) for i in range(3)]; machine(twins, twins)
    assert pick_device() == torch.device("cuda:0")


@pytest.mark.parametrize("broken", ["no package", "no driver", "a card not found"])
def test_without_nvml_the_free_memory_decides(machine, broken):
    "for all cards, or their scores could not be compared"
    library = machine(MACHINE, MACHINE[:2] if broken == "a card not found" else MACHINE, nvml=broken != "no package")
    if broken == "no driver":
        def fails(): raise library.NVMLError("Driver Not Loaded")
        library.nvmlInit = fails
    assert card_scores() == pytest.approx([card_score(c.free / c.total) for c in MACHINE])
    assert pick_device() == torch.device("cuda:0")


def test_a_card_that_refuses_us_is_last(machine, monkeypatch):
    machine(MACHINE, nvml=False)
    def info(i):
        if i == 0: raise RuntimeError("all CUDA-capable devices are busy or unavailable")
        return MACHINE[i].free, MACHINE[i].total
    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    assert pick_device() == torch.device("cuda:2")


def test_a_named_card_is_taken_and_nobody_asked(machine):
    library = machine(MACHINE)
    assert pick_device("cuda:1") == torch.device("cuda:1") and pick_device("cpu") == torch.device("cpu")
    with pytest.raises(LopError, match="no device 'cuda:7'"): pick_device("cuda:7")
    assert library.asked == 0
    pick_device(); assert library.asked == 1


def test_one_card_is_no_choice(machine):
    library = machine([B])
    assert pick_device() == torch.device("cuda:0") and library.asked == 0


@pytest.mark.parametrize("mps, best", [(True, "mps"), (False, "cpu")])
def test_without_cuda(machine, monkeypatch, mps, best):
    machine([]); monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device() == torch.device(best)
