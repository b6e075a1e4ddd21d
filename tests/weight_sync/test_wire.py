"""Layout, checksums and the mailbox: what trainer and engine have to agree on to the bit."""

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.weight_sync import wire
from grpo_jax.weight_sync.buckets import make_push_plan
from grpo_jax.weight_sync.wire import (
    BLOCK_BYTES,
    BLOCK_WORDS,
    WORD_WEIGHTS,
    Destination,
    Layout,
    Mailbox,
    Piece,
    WeightSyncError,
    compare_checksums,
    deadline_check,
    first_workers,
    piece_checksums,
)

# "a" ends in its second block, "b" fills one to its last byte, "c" is two rows of a larger tensor.
PIECES = (
    Piece("a", 0, 1250, 0, 5000),
    Piece("b", 0, 1024, 8192, 4096),
    Piece("c", 3, 2, 12288, 32),
)
NUM_BLOCKS = 4


# Checksums


def sums_of(words):
    """Inner sums of the formula, [n] uint32 words -> [n / 1024]."""
    return (words.reshape(-1, BLOCK_WORDS) * WORD_WEIGHTS).sum(axis=1, dtype=np.uint32)


def checksums(words):
    return piece_checksums(sums_of(words), PIECES)


@pytest.fixture
def words():
    return np.random.default_rng(0).integers(0, 2**32, NUM_BLOCKS * BLOCK_WORDS, dtype=np.uint32)


def test_checksums_by_hand():
    # a: 1 * 7 + 3 * (2^32 - 1) = 4 mod 2^32; b: 5 * 10; c: 7 * 2^31 = 2^31 mod 2^32.
    blocks = np.array([7, 2**32 - 1, 10, 2**31], np.uint32)
    assert piece_checksums(blocks, PIECES) == [4, 50, 2**31]
    assert piece_checksums(blocks.astype(np.int64), PIECES) == [4, 50, 2**31]  # as the engine's end has them


def test_words_by_hand():
    words = np.zeros(NUM_BLOCKS * BLOCK_WORDS, np.uint32)
    words[[0, 2]] = 10, 100  # weights 1 and 5 in block 0, of weight 1
    words[BLOCK_WORDS] = 1000  # weight 1 in block 1, of weight 3
    words[4 * BLOCK_WORDS - 1] = 1  # weight 2047 in block 3, of weight 7
    assert checksums(words) == [10 + 500 + 3000, 0, 7 * 2047]


@pytest.mark.parametrize("word", [0, 1249, 2048, 3071, 3072, 3079])  # first and last of each piece
@pytest.mark.parametrize("bit", [0, 15, 31])
def test_one_changed_bit_changes_the_number_of_its_piece_alone(words, word, bit):
    before = checksums(words)
    words[word] ^= np.uint32(1 << bit)
    changed = [a != b for a, b in zip(before, checksums(words), strict=True)]
    start = 4 * word
    assert changed == [p.offset <= start < p.offset + p.num_bytes for p in PIECES]


@pytest.mark.parametrize("others", [(0, 1), (5, 900), (10, 1034), (2048, 3071)])
def test_exchanged_words_are_seen(words, others):
    """Within a block, and between blocks: rows in the wrong order, a transposed matrix."""
    before, (i, j) = checksums(words), others
    words[[i, j]] = words[[j, i]]
    assert checksums(words) != before


def test_exchanged_blocks_are_seen(words):
    before = checksums(words)
    words[: 2 * BLOCK_WORDS] = np.roll(words[: 2 * BLOCK_WORDS], BLOCK_WORDS)
    after = checksums(words)
    assert after[0] != before[0] and after[1:] == before[1:]


# Comparing them


def layout_of(*buckets):
    pieces = tuple(tuple(Piece(name, 0, 1, 4096 * i, 4) for i, name in enumerate(names)) for names in buckets)
    sizes = tuple(4096 * len(names) for names in buckets)
    return Layout("float32", {name: (1,) for names in buckets for name in names}, pieces, sizes)


def difference(sent, received, *buckets):
    with pytest.raises(WeightSyncError) as caught:
        compare_checksums(layout_of(*buckets), sent, received)
    return str(caught.value)


def test_equal_checksums_pass():
    compare_checksums(layout_of("ab", "c"), [[1, 2], [3]], [[1, 2], [3]])


def test_the_tensors_that_differ_are_named():
    message = difference([[1, 2], [3]], [[1, 5], [4]], "ab", "c")
    assert message == "weights differ between trainer and engine: b, c"


def test_three_are_named_and_the_others_counted():
    sent, received = [[0] * 5, [0]], [[0, 1, 1, 1, 1], [1]]
    assert difference(sent, received, "abcde", "f").endswith(": b, c, d and 2 more")
    assert difference(sent[:1], [[0, 1, 1, 1, 0]], "abcde").endswith(": b, c, d")


def test_a_tensor_in_several_buckets_is_named_once():
    assert difference([[1], [2], [3]], [[0], [2], [0]], "a", "a", "a").endswith(": a")


@pytest.mark.parametrize("received", [[[1, 2]], [[1, 2], [3, 4]], [[1], [3]]])
def test_other_numbers_of_checksums_are_no_match(received):
    with pytest.raises(ValueError):
        compare_checksums(layout_of("ab", "c"), [[1, 2], [3]], received)


# Layout

LAYOUT = Layout(
    "bfloat16",
    {"a": (1250, 2), "b": (2048,), "c": (5, 8)},
    (PIECES, (Piece("c", 0, 3, 0, 48),), (Piece("c", 5, 1, 0, BLOCK_BYTES + 1),)),
    (4 * 4096, 4096, 2 * 4096),
)


def test_a_layout_travels_as_json():
    assert Layout.from_dict(json.loads(json.dumps(LAYOUT.to_dict()))) == LAYOUT


def test_a_real_layout_travels_as_json(models):
    layout = make_push_plan(models("qwen3").config, 20_000).layout
    again = Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout and list(again.tensors) == list(layout.tensors)


def test_the_largest_bucket_is_what_slots_are_made_for():
    assert LAYOUT.bucket_bytes == 4 * 4096


# Destinations


def test_workers_are_counted_through():
    engines = [Destination(n) for n in (2, 1, 4)]
    assert first_workers(engines) == [0, 2, 3]
    assert first_workers(engines[:1]) == [0] and first_workers([]) == []


# Mailbox

SLOT_BYTES = 4096


def patient():
    return deadline_check(30, "the other end of this test did nothing")


def make_buckets(count):
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, SLOT_BYTES, dtype=np.uint8) for _ in range(count)]


@pytest.fixture
def open_mailbox():
    """Returns `open_mailbox(num_readers, num_slots)`; closes what was opened."""
    with contextlib.ExitStack() as stack:

        def make(num_readers, num_slots, slot_bytes=SLOT_BYTES):
            mailbox = Mailbox.create(num_readers, num_slots, slot_bytes)
            stack.callback(mailbox.close)
            return mailbox

        yield make


def write(mailbox, buckets, check=None):
    mailbox.send(
        lambda number, bucket: np.copyto(mailbox.slot(number), bucket), iter(buckets), check or patient()
    )


def read(address, reader, count):
    mailbox, got, check = Mailbox(**address, create=False), [], patient()
    for number in range(count):
        mailbox.wait_readable(number, check)
        got.append(mailbox.slot(number).copy())
        mailbox.release(reader, number)
    mailbox.close()
    return got


@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("num_readers", [1, 3])
def test_buckets_arrive_in_order_and_whole(open_mailbox, num_readers, num_slots):
    buckets, mailbox = make_buckets(40), open_mailbox(num_readers, num_slots)
    with ThreadPoolExecutor() as pool:
        for _ in range(2):  # the mailbox serves one push after another
            mailbox.reset()
            readers = [pool.submit(read, mailbox.address, r, len(buckets)) for r in range(num_readers)]
            write(mailbox, buckets)
            for reader in readers:
                np.testing.assert_array_equal(reader.result(), buckets)
            buckets = buckets[::-1]


READER = """
import hashlib, json, sys
sys.modules["jax"] = None
from grpo_jax.weight_sync.wire import Mailbox, deadline_check
mailbox, check = Mailbox(**json.loads(sys.argv[1]), create=False), deadline_check(60, "nothing came")
for number in range(int(sys.argv[2])):
    mailbox.wait_readable(number, check)
    print(hashlib.sha256(mailbox.slot(number)).hexdigest(), flush=True)
    mailbox.release(0, number)
mailbox.close()
"""


def test_a_reader_in_another_process(open_mailbox):
    buckets, mailbox = make_buckets(20), open_mailbox(1, 2)
    command = [sys.executable, "-c", READER, json.dumps(mailbox.address), str(len(buckets))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        write(mailbox, buckets, deadline_check(60, "the other process did not read"))
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert out.split() == [hashlib.sha256(bucket).hexdigest() for bucket in buckets]


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_slow_reader_keeps_the_writer_from_overwriting(open_mailbox, num_slots):
    mailbox, buckets, waits, written = open_mailbox(2, num_slots), make_buckets(5), threading.Event(), []

    def put(number, bucket):
        np.copyto(mailbox.slot(number), bucket)
        written.append(number)

    def blocked():
        """Once the writer has asked its check, it waits."""
        waits.clear()
        assert waits.wait(30)
        return list(written)

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(mailbox.send, put, iter(buckets), waits.set)
        assert blocked() == list(range(num_slots))
        for number in range(num_slots):
            mailbox.release(1, number)  # one of two readers is done
        assert blocked() == list(range(num_slots))
        for number in range(num_slots):
            np.testing.assert_array_equal(mailbox.slot(number), buckets[number])
        mailbox.release(0, 0)  # the slow one, with the first bucket alone
        mailbox.wait_readable(num_slots, patient())
        assert blocked() == list(range(num_slots + 1))
        for number in range(1, len(buckets)):
            assert not writer.done()  # not before the last was read
            mailbox.wait_readable(number, patient())
            for reader in (0, 1):
                mailbox.release(reader, number)
        writer.result(timeout=30)
    assert written == list(range(len(buckets)))


class Given(Exception):
    """What a check of these tests raises."""


def give_up():
    raise Given


def test_the_check_ends_a_wait(open_mailbox):
    mailbox = open_mailbox(1, 2)
    with pytest.raises(Given):
        mailbox.wait_readable(0, give_up)
    with pytest.raises(Given):
        write(mailbox, make_buckets(3), give_up)  # for the third bucket there is no slot
    mailbox.reset()
    with pytest.raises(Given):
        write(mailbox, make_buckets(1), give_up)  # the last one is waited for, too


def test_what_is_there_is_not_waited_for(open_mailbox):
    mailbox = open_mailbox(1, 2)
    mailbox.wait_writable(0, give_up)
    mailbox.wait_writable(1, give_up)
    mailbox.publish(0)
    mailbox.wait_readable(0, give_up)
    mailbox.release(0, 0)
    mailbox.wait_writable(2, give_up)


def test_a_bucket_is_let_go_before_the_next_one_is_made(open_mailbox):
    """Two at once would take twice the memory of a device."""
    mailbox, ended = open_mailbox(1, 2), []

    class Bucket:
        def __init__(self, number):
            self.number = number

        def __del__(self):
            ended.append(self.number)

    def buckets():
        for number in range(3):
            assert ended == list(range(number))
            yield Bucket(number)

    mailbox.send(lambda number, _: mailbox.release(0, number), buckets(), patient())
    assert ended == [0, 1, 2]


def test_closing_removes_the_file_and_nothing_that_is_in_use():
    mailbox = Mailbox.create(1, 2, SLOT_BYTES)
    reader = Mailbox(**mailbox.address, create=False)
    assert Path(mailbox.path).stat().st_mode & 0o077 == 0  # weights are nobody else's business
    mailbox.slot(1)[:] = 7
    reader.close()
    assert Path(mailbox.path).exists()  # a reader goes, and the file stays
    view = mailbox.slot(1)
    mailbox.close()
    assert not Path(mailbox.path).exists()
    assert (view == 7).all()


def test_counters_alone_take_no_slots(open_mailbox):
    mailbox = open_mailbox(3, 2, slot_bytes=0)
    assert Path(mailbox.path).stat().st_size == wire.HEADER_BYTES


def test_memory_that_is_not_there_names_the_setting():
    with pytest.raises(WeightSyncError, match=r"/dev/shm has no room.*rollout\.bucket_mb") as caught:
        Mailbox.create(1, 2, 2**50)
    assert f"{2**51 // 2**20}" in str(caught.value)  # two slots of a pebibyte, in MiB
    assert not list(Path("/dev/shm").glob(f"grpo_jax-{os.getpid()}-*"))  # and leaves nothing behind


def test_shared_memory_that_cannot_be_written_is_told(monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(wire.os, "open", refuse)
    with pytest.raises(WeightSyncError, match=r"/dev/shm.*Permission denied"):
        Mailbox.create(1, 2, SLOT_BYTES)


def test_a_reader_that_cannot_map_it_leaves_the_writers_file(open_mailbox, monkeypatch):
    mailbox = open_mailbox(1, 2)

    def refuse(*args):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(wire.mmap, "mmap", refuse)
    with pytest.raises((OSError, WeightSyncError)):
        Mailbox(**mailbox.address, create=False)
    assert Path(mailbox.path).exists()


def test_a_deadline(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(wire, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    check = deadline_check(5.0, "an engine did not answer")
    now[0] = 104.9
    check()
    now[0] = 105.1
    with pytest.raises(WeightSyncError, match=r"^an engine did not answer within 5 s$"):
        check()


def test_the_file_can_go_once_all_have_it_open():
    """As after connecting: a process that is killed leaves nothing in shared memory."""
    writer = Mailbox.create(1, 2, 4096)
    reader = Mailbox(**writer.address, create=False)
    writer.unlink()
    assert not os.path.exists(writer.path)
    writer.slot(0)[:] = 7
    writer.publish(0)
    reader.wait_readable(0, deadline_check(5, "nothing came"))
    assert reader.slot(0).tolist() == [7] * 4096
    reader.close()
    writer.close()
