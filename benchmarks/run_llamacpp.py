"""One session of llama.cpp (llama-cpp-python), the GGUF mapped, no warm-up. See session.py."""

from __future__ import annotations

from typing import Any

import session


class LlamaCpp:
    def __init__(self, spec: dict[str, Any]) -> None:
        import llama_cpp

        context = 64 * -(-(len(spec["prompt"]) + len(spec["forced"]) + 8) // 64)
        self.model = llama_cpp.Llama(
            spec["model"], n_ctx=context, n_batch=512, n_threads=spec["threads"], n_threads_batch=spec["threads"], use_mmap=True,
            use_mlock=False, verbose=False, **spec["options"],
        )  # fmt: skip
        self.vocabulary = self.model.n_vocab()

    def feed(self, tokens: list[int]) -> int:
        import llama_cpp
        import numpy as np

        self.model.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.vocabulary,))))

    def stats(self) -> dict[str, Any]:
        return {}

    def about(self) -> dict[str, Any]:
        return {}


if __name__ == "__main__":
    raise SystemExit(session.measure(LlamaCpp))
