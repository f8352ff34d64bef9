"""Stock llama.cpp through ctypes: its shared libraries as benchmarks/llama_cpp.py builds them, no headers needed.

Parameter structs are treated as opaque: the library fills in its defaults, and only leading fields whose place has
not changed for years are set. They are passed in memory (SysV and AAPCS64 pass large structs so), so a struct
declared larger than it is does no harm.
"""

import ctypes
import os
from pathlib import Path

import numpy as np


class Opaque(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def find_libraries() -> Path | None:
    """The folder with libllama.so that STEPFLASH_LLAMA_LIB names."""
    folder = os.environ.get("STEPFLASH_LLAMA_LIB")
    return Path(folder) if folder else None


class Llama:
    """The functions that the tests need."""

    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(str(folder / "libllama.so"), mode=ctypes.RTLD_GLOBAL)
        for name, result in (
            ("llama_model_default_params", Opaque),
            ("llama_context_default_params", Opaque),
            ("llama_model_quantize_default_params", Opaque),
            ("llama_model_load_from_file", ctypes.c_void_p),
            ("llama_init_from_model", ctypes.c_void_p),
            ("llama_model_get_vocab", ctypes.c_void_p),
            ("llama_vocab_n_tokens", ctypes.c_int32),
            ("llama_batch_init", Batch),
            ("llama_decode", ctypes.c_int32),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float)),
            ("llama_model_quantize", ctypes.c_uint32),
            ("llama_tokenize", ctypes.c_int32),
            ("llama_model_chat_template", ctypes.c_char_p),
            ("llama_vocab_is_eog", ctypes.c_bool),
        ):
            getattr(self.library, name).restype = result
        self.library.llama_backend_init()
        self.library.llama_log_set(_SILENT, None)

    def load(self, path: Path) -> ctypes.c_void_p:
        model = self.library.llama_model_load_from_file(
            str(path).encode(), self.library.llama_model_default_params()
        )
        assert model, f"llama.cpp refuses {path}"
        return ctypes.c_void_p(model)

    def logits(self, path: Path, ids: list[int]) -> np.ndarray:
        """[len(ids), vocab_size] float32."""
        model = self.load(path)
        params = self.library.llama_context_default_params()
        params.words[0] = params.words[1] = params.words[2] = 1024  # n_ctx, n_batch, n_ubatch
        context = ctypes.c_void_p(self.library.llama_init_from_model(model, params))
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert self.library.llama_decode(context, batch) == 0
        vocab_size = self.library.llama_vocab_n_tokens(
            ctypes.c_void_p(self.library.llama_model_get_vocab(model))
        )
        rows = [self.library.llama_get_logits_ith(context, i)[:vocab_size] for i in range(len(ids))]
        self.library.llama_free(context)
        self.library.llama_model_free(model)
        return np.array(rows, dtype=np.float32)

    def template_and_ends(self, path: Path) -> tuple[str, set[int]]:
        """The chat template that it finds, and the tokens at which it stops."""
        model = self.load(path)
        vocab = ctypes.c_void_p(self.library.llama_model_get_vocab(model))
        template = self.library.llama_model_chat_template(model, None).decode()
        count = self.library.llama_vocab_n_tokens(vocab)
        ends = {token for token in range(count) if self.library.llama_vocab_is_eog(vocab, token)}
        self.library.llama_model_free(model)
        return template, ends

    def tokenize(self, path: Path, text: str) -> list[int]:
        model = self.load(path)
        vocab = ctypes.c_void_p(self.library.llama_model_get_vocab(model))
        raw, found = text.encode(), (ctypes.c_int32 * 4096)()
        count = self.library.llama_tokenize(vocab, raw, len(raw), found, 4096, False, True)
        self.library.llama_model_free(model)
        return list(found[:count])

    def quantize(self, source: Path, out: Path, file_type: int) -> None:
        params = self.library.llama_model_quantize_default_params()
        params.words[0], params.words[1] = 1, file_type  # nthread, ftype
        status = self.library.llama_model_quantize(
            str(source).encode(), str(out).encode(), ctypes.byref(params)
        )
        assert status == 0


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
