"""One session of transformers with accelerate's offloading. See session.py.

Options: placement 'disk' (every weight offloaded), 'auto' (as many layers in memory as `resident` bytes hold, the rest on disk) or
'mapped' (no offloading: the weights stay file mappings); experts: transformers' implementation of the experts.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import session


class Transformers:
    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(spec["threads"])
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        options = spec["options"]
        placement: dict[str, Any] = {"device_map": "cpu"}
        if options["placement"] != "mapped":
            # Needed by the published layout, whose offloaded weights transformers converts and writes anew at each start.
            self.folder = tempfile.TemporaryDirectory(dir=os.path.dirname(spec["model"]))
            placement = {"offload_folder": self.folder.name, "device_map": {"": "disk"}}
            if options["placement"] == "auto":
                placement |= {"device_map": "auto", "max_memory": {"cpu": options["resident"]}}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype=torch.bfloat16, experts_implementation=options["experts"], **placement
        ).eval()

    def start(self) -> None:
        self.past = None

    def feed(self, tokens: list[int]) -> int:
        import torch

        with torch.inference_mode():
            out = self.model(torch.tensor([tokens]), past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def stats(self) -> dict[str, Any]:
        return {}

    def about(self) -> dict[str, Any]:
        return {}


if __name__ == "__main__":
    raise SystemExit(session.main(Transformers))
