"""Cost of a training step with a split language model as decoder, beside a fresh decoder of as many layers.

    python -P -m benchmarks.captions.language_model [--work WORK] [--turns 5]

A GPT-2 of 8 layers, 256 wide, with 8,000 words and fresh weights, 16 images of 224 pixels through a small ViT, and
texts of 32 tokens, fp32: forward of both terms, backward, and AdamW. Four layers are the text tower. Behind them stand
four pairs of blocks, as CoCa has them, or the other four layers with a gated block before each, which train whole, by
LoRA, or not at all. The ways take turns in one process; counted is its processor time.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from benchmarks.processes import apart
from benchmarks.result_cache import ResultCache, arguments_of_turns, machine
from vlm.batch import Images, Texts
from vlm.model.attach import freeze_unreached
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.outputs import PAIR

WORDS, WIDTH, HEADS, LENGTH, IMAGES = 8_000, 256, 8, 32, 16
VISION = {"image_size": 224, "patch_size": 32, "width": WIDTH, "layers": 4, "head_width": 32}
OUTPUTS = PAIR | {"text_likelihood"}
FRESH = "a fresh decoder (CoCa)"
# The layers of the language model that is read, and the captioner behind the first four.
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    FRESH: (4, {"layers": 4}),
    "split, all of it trains": (8, {"language_model": {"train": "all"}}),
    "split, LoRA of rank 8": (8, {"language_model": {"train": "lora"}}),
    "split, locked": (8, {"language_model": {"train": "none"}}),
}


def built(name: str) -> DualEncoder:
    """The model of one way, as a run trains it."""
    layers, decoder = WAYS[name]
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": layers, "n_head": HEADS}
        GPT2Config(**sizes, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
        words = ["<end>", *(f"w{number}" for number in range(1, WORDS))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w1"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        library = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")
        library.save_pretrained(folder)
        text = {"transformers": folder, "pretrained": False, "pool": "query", "context_length": LENGTH}
        towers = {"embed_dim": WIDTH, "image": {"vision_cfg": VISION}, "text": text}
        captioner = {"pooler": "single", "queries": 32, "pooler_heads": HEADS, "heads": HEADS, **decoder}
        model = build_model(ModelConfig.model_validate({"towers": towers, "captioner": captioner}))
    freeze_unreached(model, OUTPUTS)
    return model


def stepper(model: DualEncoder) -> Callable[[], float]:
    """A step of training, which tells its seconds of processor time."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        " ".join(f"w{n}" for n in torch.randint(1, WORDS, (LENGTH - 2,), generator=generator)) for _ in range(IMAGES)
    ]
    pixels = torch.randint(0, 256, (IMAGES, 3, 224, 224), dtype=torch.uint8, generator=generator)
    parts = {"image": Images(pixels), "text": Texts(*model.tokenizer(texts))}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    pairs = torch.arange(IMAGES)

    def step() -> float:
        began = time.process_time()
        made = model(parts, OUTPUTS)
        logits = made["logit_scale"] * made["image"] @ made["text"].T
        loss = torch.nn.functional.cross_entropy(logits, pairs) - made["text_likelihood"][:, 0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.process_time() - began

    return step


def measure(num_turns: int) -> dict[str, dict[str, Any]]:
    """Each way's times, turn by turn, after one that is not counted; and its parameters."""
    torch.set_num_threads(1)
    made = {name: built(name) for name in WAYS}
    steps = {name: stepper(model) for name, model in made.items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(num_turns):
        for name, step in steps.items():
            times[name].append(step())
    return {
        name: {
            "times": times[name],
            "all": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        for name, model in made.items()
    }


def main() -> None:
    """Measure what is missing, then print the table."""
    arguments = arguments_of_turns(__doc__)
    if arguments.ask:
        print(json.dumps(measure(arguments.ask[1])))
        return
    results = ResultCache(arguments.work, "captions-language-model", arguments.again)
    found = results("steps", lambda: apart("benchmarks.captions.language_model", "steps", arguments.turns))
    print(machine(), "\n")
    print("| decoder | CPU s a step, median (least to most) | of the fresh decoder's | parameters, M | that train, M |")
    print("|---|---|---|---|---|")
    own = statistics.median(found[FRESH]["times"])
    for name, one in found.items():
        median = statistics.median(one["times"])
        spread = f"{median:.2f} ({min(one['times']):.2f} to {max(one['times']):.2f})"
        print(f"| {name} | {spread} | {median / own:.2f} | {one['all'] / 1e6:.1f} | {one['trained'] / 1e6:.1f} |")


if __name__ == "__main__":
    main()
