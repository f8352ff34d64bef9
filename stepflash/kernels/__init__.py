"""Tensors in, tensors out: operations, their references, and the kernels that replace them.

Importing this package bounds two caches of PyTorch. For every number of rows that a bf16 or float16 product meets
on a CPU, ideep and oneDNN each keep a compiled primitive, 1024 of them by default and half a megabyte apiece:
experts meet a new number in every step, and a plain network grew by 1 GB. Both read their variable at the first
product; a value that is already there stays. Packed weights do not use them.
"""

import os

KEPT_PRIMITIVES = 64
for _variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_variable, str(KEPT_PRIMITIVES))
