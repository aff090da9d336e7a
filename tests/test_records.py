"""What a notebook can't show of the records: killed processes, full disks, cut and damaged files, readers beside writers."""
import os, random, subprocess, sys, textwrap, time  # noqa: F401 (os is for the children)
from pathlib import Path

import numpy as np, pandas as pd, pyarrow.parquet as pq, pytest
from hypothesis import given, settings, strategies as st
from pandas.testing import assert_frame_equal

from lop_nb.records import COLUMNS, SCHEMA, Records, pack, read_records, read_stream
from lop_nb.runtime import LopError


def rows(first, n):
    "Rows whose value is their number in the run"
    return [dict(replica=i % 3, seed=i % 3 + 10, task=i // 100, epoch=0, step=i, examples=32 * i, split="train", layer=f"act_{i % 5}",
                 metric="loss", value=float(i)) for i in range(first, first + n)]

def expected(values):
    return pd.DataFrame([dict(run="") | r for i in values for r in rows(i, 1)], columns=COLUMNS)

def assert_records(frame, values):
    "The rows of these numbers, in this order, with the same types whether or not there are any"
    assert list(frame.columns) == COLUMNS
    assert frame.dtypes.to_dict() == SCHEMA.empty_table().to_pandas().dtypes.to_dict()
    if len(values): assert_frame_equal(frame, expected(values), check_index_type=False)
    else: assert len(frame) == 0

def child(code, *args):
    "A process that knows `rows` and `Records`"
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_records import *\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), *map(str, args)], stdout=subprocess.PIPE, text=True)


# ---- killed ----
WRITER = """
    position = int(sys.argv[3])
    r = Records(sys.argv[2], resume_at=position if position else None)
    while True:
        r.add(rows(r.position, 37)); r.flush()
        print(r.position, flush=True)
"""

def test_killed_again_and_again(tmp_path):
    "Every batch that was acknowledged before SIGKILL is there; resumed at a row in between, three times"
    luck, position = random.Random(0), 0
    for _ in range(3):
        p = child(WRITER, tmp_path, position)
        p.stdout.readline()
        time.sleep(luck.uniform(0, .15)); p.kill()
        acknowledged = max([position + 37] + [int(line) for line in p.stdout.read().splitlines() if line])
        p.wait(); p.stdout.close()
        frame = read_records(tmp_path)
        assert len(frame) >= acknowledged
        assert (len(frame) - position) % 37 == 0
        assert frame.value.tolist() == list(range(len(frame)))
        position = luck.randrange(1, len(frame))
    assert_records(frame, range(len(frame)))


@pytest.mark.parametrize("kept", [None, 0, 7, 300])
def test_cut_header(tmp_path, kept):
    "A process killed before its header was whole leaves nothing that disturbs, alone or behind another"
    Records(tmp_path/"new").close()
    f = tmp_path/"new/records-0.arrows"
    if kept is not None: f.write_bytes(f.read_bytes()[:kept])
    assert_records(read_records(tmp_path/"new"), [])
    (tmp_path/"old").mkdir()
    r = Records(tmp_path/"old/run"); r.add(rows(0, 10)); r.close()
    f.rename(tmp_path/"old/run/records-1.arrows")
    # a whole header says start=0: all rows before it were rolled back; a cut one says nothing
    assert_records(read_records(tmp_path/"old"), [] if kept is None else range(10))
    n = 0 if kept is None else 10
    r = Records(tmp_path/"old/run", resume_at=n); r.add(rows(n, 5)); r.close()
    assert_records(read_records(tmp_path/"old"), range(n + 5))


def test_cut_anywhere(tmp_path):
    "A stream cut at any byte gives a prefix of whole batches, and never fewer for more bytes"
    r = Records(tmp_path/"a")
    ends = []
    for k in range(4):
        r.add(rows(5 * k, 5)); r.flush(); ends.append((tmp_path/"a/records-0.arrows").stat().st_size)
    data = (tmp_path/"a/records-0.arrows").read_bytes()
    (tmp_path/"b").mkdir(); f = tmp_path/"b/records-0.arrows"
    for size in sorted({*range(0, len(data) + 1, 13), *ends, *(e - 1 for e in ends)}):
        f.write_bytes(data[:size])
        assert_records(read_records(tmp_path/"b"), range(5 * sum(e <= size for e in ends)))


# ---- lives of a run ----
ops = st.lists(st.one_of(st.tuples(st.just("add"), st.integers(1, 40)), st.sampled_from(["flush", "checkpoint", "kill", "compact", "interrupt"]).map(lambda o: (o, 0))), max_size=25)

@settings(max_examples=40, deadline=None)
@given(ops)
def test_any_life(tmp_path_factory, ops):
    "Whatever happens to a run, its table is what a list would hold"
    folder = tmp_path_factory.mktemp("run")
    r, fresh = Records(folder), 0
    held, safe, saved = [], 0, 0            # all rows; how many a kill can't take; the checkpoint
    for op, n in ops:
        if op == "add":
            r.add(rows(fresh, n)); held += range(fresh, fresh + n); fresh += n
        elif op in ("flush", "checkpoint"):
            r.flush(); safe = len(held)
            if op == "checkpoint": saved = r.position
        elif op == "kill":
            assert_records(read_records(folder), held[:safe])
            r = Records(folder, resume_at=saved); held = held[:saved]; safe = saved
        elif op == "interrupt" and r.stream:   # between the write and its note, as Ctrl-C may fall
            real = Records._write
            def torn(self, batch): real(self, batch); raise KeyboardInterrupt
            Records._write = torn
            try: r.flush()
            except KeyboardInterrupt: pass
            finally: Records._write = real
            r.flush(); safe = len(held)
        elif op == "compact": r.compact(); safe = len(held)
        assert r.position == len(held)
    assert_records(r.frame(), held)
    assert_records(read_records(folder), held)


def test_compact_killed_between(tmp_path):
    "Both the Parquet file and the streams are there: the Parquet file wins, and the next process goes on from it"
    r = Records(tmp_path); r.add(rows(0, 30)); r.flush()
    stream = (tmp_path/"records-0.arrows").read_bytes()
    r.compact()
    (tmp_path/"records-0.arrows").write_bytes(stream[:-50])
    assert_records(read_records(tmp_path), range(30))
    r = Records(tmp_path, resume_at=20); r.add(rows(20, 4)); r.close()
    assert_records(read_records(tmp_path), range(24))
    pack(tmp_path)
    assert_records(read_records(tmp_path), range(24))
    assert [f.name for f in tmp_path.iterdir()] == ["records.parquet"]


def test_compact_of_a_begun_run(tmp_path):
    Records(tmp_path).compact()
    assert_records(read_records(tmp_path), [])
    pack(tmp_path)


def test_resume_beyond_the_end(tmp_path):
    r = Records(tmp_path); r.add(rows(0, 10)); r.close()
    f = tmp_path/"records-0.arrows"; f.write_bytes(f.read_bytes()[:-100])
    with pytest.raises(LopError, match="Can't go on at row 10: .* holds 0 whole rows"): Records(tmp_path, resume_at=10)
    with pytest.raises(LopError, match="holds a run already. Add resume=true"): Records(tmp_path)
    with pytest.raises(LopError, match="Can't go on at row 1"): Records(tmp_path/"none", resume_at=1)


# ---- readers beside a writer ----
def test_read_while_another_writes_and_packs(tmp_path):
    p = child("""
        r = Records(sys.argv[2]); print(flush=True)
        for k in range(400):
            r.add(rows(r.position, 11)); r.flush()
            if k % 10 == 9: r.compact()
    """, tmp_path)
    p.stdout.readline(); seen, done = [0], False
    while not done:
        done = p.poll() is not None
        frame = read_records(tmp_path); seen.append(len(frame))
        assert frame.value.tolist() == list(range(len(frame)))
    p.stdout.close()
    assert p.returncode == 0 and seen == sorted(seen) and seen[-1] == 4400
    assert len(set(seen)) > 3           # it was read in the middle


# ---- a full disk ----
def test_disk_full(tmp_path):
    "The disk fills in mid-batch: one clear error, every earlier row readable, and the run goes on when there is room"
    p = child("""
        import resource
        r = Records(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        while True:
            try: r.add(rows(r.position, 50)); r.flush()
            except LopError as e: print(r.written, r.position, e); break
        assert os.path.getsize(sys.argv[2] + "/records-0.arrows") == 20_000      # cut in the middle of a batch
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        before = len(read_records(sys.argv[2]))
        r.flush(); print(before, len(read_records(sys.argv[2])))
    """, tmp_path)
    out, _ = p.communicate(); assert p.returncode == 0
    first, second = out.splitlines()
    written, position, message = first.split(maxsplit=2)
    assert message == f"Can't write records in {tmp_path}: File too large. The first {written} rows are safe; free some space and go on with resume=true."
    assert second.split() == [written, position] and int(position) == int(written) + 50
    assert_records(read_records(tmp_path), range(int(position)))


def test_disk_full_while_packing(tmp_path):
    r = Records(tmp_path); r.add(rows(0, 5000)); r.close()
    p = child("""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
        with pytest.raises(LopError, match="Could not write .*records.parquet: File too large"): pack(sys.argv[2])
    """, tmp_path)
    p.communicate(); assert p.returncode == 0
    assert [f.name for f in tmp_path.iterdir()] == ["records-0.arrows"]
    assert_records(read_records(tmp_path), range(5000))


# ---- damaged and foreign files ----
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "foreign"])
def test_damaged_parquet(tmp_path, damage):
    f = tmp_path/"run/records.parquet"
    r = Records(tmp_path/"run"); r.add(rows(0, 100)); r.compact()
    if damage == "foreign": pd.DataFrame(dict(a=[1])).to_parquet(f)
    else: f.write_bytes({"cut": f.read_bytes()[:-20], "empty": b"", "noise": bytes(range(256)) * 20}[damage])
    for path in (f, tmp_path/"run", tmp_path):
        with pytest.raises(LopError, match="Can't read .*run/records.parquet as records"): read_records(path)
    with pytest.raises(LopError, match="records.parquet"): Records(tmp_path/"run", resume_at=5)


def test_a_stream_that_lost_rows(tmp_path):
    for n in (0, 20):
        r = Records(tmp_path, resume_at=n or None); r.add(rows(n, 20)); r.close()
    f = tmp_path/"records-0.arrows"; f.write_bytes(f.read_bytes()[:700])
    with pytest.raises(LopError, match="Rows 0 to 20 are missing before .*records-1.arrows"): read_records(tmp_path)


def test_nothing_to_read(tmp_path):
    for path in (tmp_path, tmp_path/"absent"):
        with pytest.raises(LopError, match=f"No records in {path}"): read_records(path)
    with pytest.raises(LopError, match="No records"): read_records([])


# ---- tables ----
def test_columns_and_rows_agree(tmp_path):
    import torch
    a, b = Records(), Records(tmp_path)
    acc = torch.tensor([[.5, .25], [1., 0.]])
    a.add(replica=np.arange(2)[:, None], seed=torch.tensor([[7], [8]]), task=0, epoch=1, step=[5, 6], examples=9, layer=["x", "y"], metric="m", value=acc)
    b.add([dict(replica=r, seed=7 + r, task=0, epoch=1, step=5 + k, examples=9, layer="xy"[k], metric="m", value=acc[r, k]) for r in range(2) for k in range(2)])
    assert_frame_equal(a.frame(), b.frame())
    assert a.frame().value.tolist() == [.5, .25, 1., 0.]


def test_floats_keep_every_bit(tmp_path):
    values = [0.1, -0.0, 5e-324, float("inf"), float("nan"), 1 / 3]
    r = Records(tmp_path); r.add(replica=0, seed=2**63 - 1, task=0, epoch=0, step=0, examples=0, metric="m", value=values); r.compact()
    frame = read_records(tmp_path)
    assert frame.value.to_numpy().tobytes() == np.array(values).tobytes()
    assert frame.seed.tolist() == [2**63 - 1] * 6
    with pytest.raises(LopError, match="'seed' of a record holds int64"): r.add(replica=0, seed=2**63, task=0, epoch=0, step=0, examples=0, metric="m", value=1.)


def test_names_of_runs(tmp_path):
    for name in ("a/0", "b/0", "b/1"):
        r = Records(tmp_path/name); r.add([dict(row, run="arm" if name == "a/0" else "") for row in rows(0, 2)]); r.close()
    assert read_records(tmp_path/"a").run.unique().tolist() == ["arm"]
    assert read_records(tmp_path).run.unique().tolist() == ["a/0/arm", "b/0", "b/1"]
    assert read_records(str(tmp_path/"b")).run.unique().tolist() == ["0", "1"]
    assert read_records([tmp_path/"b/1", tmp_path/"a"]).run.unique().tolist() == ["b/1", "a/0/arm"]
    for name in ("a/0", "b/0"): pack(tmp_path/name)
    assert read_records([tmp_path/"a/0/records.parquet", tmp_path/"b/0/records.parquet"]).run.unique().tolist() == ["a/0/records/arm", "b/0/records"]


def test_other_files_are_left_alone(tmp_path):
    r = Records(tmp_path); r.add(rows(0, 5)); r.flush()
    for name in ("records-0 (copy).arrows", "records-.arrows", "records.txt", ".records.parquet.7.tmp"): (tmp_path/name).write_text("?")
    assert_records(read_records(tmp_path), range(5)); r.compact()
    assert len(list(tmp_path.iterdir())) == 5


def test_more_than_ten_starts(tmp_path):
    for k in range(12): r = Records(tmp_path, resume_at=3 * k or None); r.add(rows(3 * k, 4)); r.close()
    assert_records(read_records(tmp_path), range(37))


def test_groupby_has_no_ghosts(tmp_path):
    r = Records(tmp_path); r.add(rows(0, 5)); r.add([dict(rows(0, 1)[0], metric="other", layer="act_9")]); r.compact()
    frame = read_records(tmp_path)
    assert len(frame.groupby(["metric", "layer"]).value.mean()) == 6
    assert len(frame.query("metric == 'loss' and layer == 'act_1'")) == 1


def test_others_can_read_the_files(tmp_path):
    "Plain Arrow and Parquet, for any other program"
    r = Records(tmp_path); r.add(rows(0, 5)); r.close()
    assert len(read_stream(tmp_path/"records-0.arrows")[1]) == 5
    r.compact()
    assert pq.read_table(tmp_path/"records.parquet").schema.names == COLUMNS
    assert_frame_equal(pd.read_parquet(tmp_path/"records.parquet"), read_records(tmp_path))
