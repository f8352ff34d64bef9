# mypy: ignore-errors
"""How every kernel of `triton_*.py` begins, and what its launch is told.

Hopper and later overlap kernels that follow one another: the programs of the next one come in as soon as all of
this one's are running, do what depends on nothing, and wait. `enter` is the first line of a kernel; it must come
before the first access to memory that another writes or reads, and no kernel may leave it out: that one has waited
means that all before it are over.

Numbers of tokens and the like are `do_not_specialize`: a kernel is not compiled anew for one token, or sixteen.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ON_DEVICE = tl.constexpr(not triton.knobs.runtime.interpret)
# Without a device kernels are compiled for Hopper.
OVERLAPS = tl.constexpr(
    ON_DEVICE.value and (not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0))
)
OVERLAP = {"launch_pdl": True} if OVERLAPS.value else {}  # of launches


@triton.jit
def announce():
    """Lets the next kernel's programs come in."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait():
    """Waits for the kernels before."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def enter():
    announce()
    wait()


@triton.jit
def fetch(pointers, mask):
    """Asks for the lines of memory behind these pointers."""
    if OVERLAPS:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r", [pointers.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def is_last(counter, count):
    """Whether all but this one of `count` programs have come here, and so what they stored before can be read.

    Read it past the multiprocessor's own cache (".cg"). The counter is 0 before and after.
    """
    tl.debug_barrier()  # the whole program has stored
    arrived = tl.atomic_add(counter, 1, sem="acq_rel") + 1
    if arrived == count:
        tl.store(counter, 0)
    return arrived == count
