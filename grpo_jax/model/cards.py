"""What the devices that can be planned for by name hold, and how fast they are.

Rates of H100 and H200 were measured, as docs/performance.md says ("Is my speed normal?"). Those of other cards are
theirs by the ratio of the data sheets, and marked as such.
"""

import dataclasses

MATMUL_SHARE = 0.77
"""Of the data sheet's dense bfloat16 rate: a product of 8192 x 8192 (`benchmarks/matmul.py`), on H100 and H200."""

SUSTAINED = 0.82
"""Of the rate of a large product: what the products of a step reach, one after the other for seconds, in sizes of
their own."""
ATTENTION = 0.7
"""The same for cuDNN's attention: the difference between rows of 640 and of 4,224 tokens."""
HBM_SHARE = 0.9
"""Of the data sheet's rate: what a copy reaches."""


@dataclasses.dataclass(frozen=True)
class Card:
    """One device, and what lies between it and its neighbours."""

    memory: int
    """Bytes, as the driver reports them."""
    matmul: float
    """FLOP/s of a large bfloat16 product, for a moment; 0: speed is not predicted."""
    hbm: float = 0.0
    """Bytes/s of its memory, by the data sheet."""
    bus: float = 0.0
    """Bytes/s from or to pinned memory of the host."""
    link: float = 0.0
    """Bytes/s that a device sends while gradients are summed over several."""
    sequence: float = 4.8e-6
    """Seconds of a step of decoding for each sequence in it: its token is drawn, and handed over by Python."""
    is_measured: bool = False
    name_in_jax: str = ""
    """A part of JAX's `device_kind` that no other card has."""

    @property
    def products(self) -> float:
        """FLOP/s of matrix products within a step."""
        return SUSTAINED * self.matmul

    @property
    def attention(self) -> float:
        """FLOP/s of fused attention."""
        return ATTENTION * self.matmul

    @property
    def copying(self) -> float:
        """Bytes/s, read and written together."""
        return HBM_SHARE * self.hbm


def _by_data_sheet(memory: int, tflops: float, hbm: float, bus: float, link: float, name_in_jax: str) -> Card:
    return Card(memory, MATMUL_SHARE * tflops * 1e12, hbm, bus, link, name_in_jax=name_in_jax)


CARDS = {
    "h100": Card(81_559 * 2**20, 770e12, 3.35e12, 55e9, 130e9, 10.7e-6, True, "H100 80GB HBM3"),
    "h200": Card(143_771 * 2**20, 755e12, 4.8e12, 55e9, 130e9, 4.8e-6, True, "H200"),
    "b200": _by_data_sheet(183_359 * 2**20, 2250, 8e12, 55e9, 260e9, "B200"),
    "a100": _by_data_sheet(81_920 * 2**20, 312, 2.04e12, 25e9, 87e9, "A100-SXM4-80GB"),
    "a100-40": _by_data_sheet(40_960 * 2**20, 312, 1.56e12, 25e9, 87e9, "A100-SXM4-40GB"),
    "l40s": _by_data_sheet(46_068 * 2**20, 362, 0.864e12, 25e9, 20e9, "L40S"),
    # Of a TPU, what JAX gives to programs.
    "tpu-v4": _by_data_sheet(round(30.75 * 2**30), 275, 1.228e12, 16e9, 150e9, "TPU v4"),
    "tpu-v5e": _by_data_sheet(round(15.75 * 2**30), 197, 0.819e12, 16e9, 100e9, "TPU v5 lite"),
    "tpu-v5p": _by_data_sheet(round(95.74 * 2**30), 459, 2.765e12, 16e9, 300e9, "TPU v5"),
    "tpu-v6e": _by_data_sheet(round(31.25 * 2**30), 918, 1.64e12, 16e9, 224e9, "TPU v6 lite"),
}
"""By the names of `fused_attention.DEVICE_KINDS`."""


def find_card(device_kind: str) -> str:
    """The name of the card that JAX calls so; "" where its speed is not known."""
    names = [name for name, card in CARDS.items() if card.name_in_jax and card.name_in_jax in device_kind]
    return max(names, key=lambda name: len(CARDS[name].name_in_jax), default="")


@dataclasses.dataclass(frozen=True)
class Slice:
    """TPU chips that their own links join."""

    card: str
    topology: str
    """As JAX calls it."""
    num_devices: int
    """Chips."""


GRIDS = {
    4: ("2x2", "2x2x1"),
    8: ("2x4", "2x2x2"),
    16: ("4x4", "2x2x4"),
    32: ("4x8", "2x4x4"),
    64: ("8x8", "4x4x4"),
    128: ("8x16", "4x4x8"),
    256: ("16x16", "4x8x8"),
    512: ("", "8x8x8"),
    1024: ("", "8x8x16"),
}
"""Chips -> how they are laid out: of two dimensions (v5e, v6e), and of three (v4, v5p)."""


def find_slice(name: str) -> Slice | None:
    """The slice of Google's name, as "v5e-16" or "v5p-8"; None: there is no such one.

    The number counts chips of v5e and v6e, and cores of v4 and v5p, whose chips have two.
    """
    generation, _, number = name.partition("-")
    if not number.isdecimal() or f"tpu-{generation}" not in CARDS:
        return None
    cores = 2 if generation in ("v4", "v5p") else 1
    return slice_of(f"tpu-{generation}", int(number[:6]) // cores) if int(number[:6]) % cores == 0 else None


def slice_of(card: str, num_devices: int) -> Slice | None:
    """The slice of so many chips; None: there is no such one, or the card is no TPU."""
    grid = GRIDS.get(num_devices, ("", ""))[card in ("tpu-v4", "tpu-v5p")]
    is_tpu = card.startswith("tpu-")
    return Slice(card, f"{card.removeprefix('tpu-')}:{grid}", num_devices) if grid and is_tpu else None
