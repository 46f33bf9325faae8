"""llama.cpp (llama-cpp-python), the GGUF mapped, no warm-up. See session.py.

Options: repack: whether it may copy the weights into layouts of its own, in memory, which is faster and needs the whole model there.
By itself it does so, also with a mapped file.
"""

from __future__ import annotations

from typing import Any

import session


class LlamaCpp:
    def __init__(self, spec: dict[str, Any]) -> None:
        import llama_cpp

        defaults = llama_cpp.llama_model_default_params

        def params() -> Any:
            chosen = defaults()
            chosen.use_extra_bufts = spec["options"]["repack"]
            return chosen

        llama_cpp.llama_cpp.llama_model_default_params = params  # Llama() has no argument for it
        self.model = llama_cpp.Llama(
            spec["model"], n_ctx=64 * -(-spec["context"] // 64), n_batch=512, n_threads=spec["threads"], n_threads_batch=spec["threads"],
            use_mmap=True, use_mlock=False, verbose=False,
        )  # fmt: skip
        self.vocabulary = self.model.n_vocab()

    def start(self) -> None:
        self.model.reset()

    def feed(self, tokens: list[int]) -> int:
        import llama_cpp
        import numpy as np

        self.model.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.vocabulary,))))

    def stats(self) -> dict[str, Any]:
        return {}

    def about(self) -> dict[str, Any]:
        import llama_cpp

        return {"system": llama_cpp.llama_print_system_info().decode()}


if __name__ == "__main__":
    raise SystemExit(session.main(LlamaCpp))
