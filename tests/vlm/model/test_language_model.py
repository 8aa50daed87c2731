"""A language model split into text tower and decoder: its own logits at the start, pools, adapters, locks, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, log_softmax, normalize

from tests.vlm.model.hugging_face import save_language_model, save_text_model
from tests.vlm.model.tiny import TEXT, TEXTS, VIT, perturb, some_images
from vlm.batch import Images, Texts
from vlm.errors import UserError
from vlm.model.attach import freeze_unreached
from vlm.model.attention import Block, initialise_blocks
from vlm.model.build import build_model
from vlm.model.captioner import NextToken
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.exchange import export_open_clip
from vlm.model.foreign import ForeignFiles
from vlm.model.language_model import TanhGate, merge_adapters
from vlm.outputs import PAIR

OUTPUTS = PAIR | {"text_likelihood"}
POOLS = ("query", "class", "mean", "end", "first")


def config_of(folder: Path, split: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """A model whose captioner splits the language model in `folder`; `text` and `captioner` are further options."""
    text = {"transformers": str(folder), "context_length": 16, "pool": "query", **changes.pop("text", {})}
    captioner: Any = {"heads": 2, "queries": 4, "pooler_heads": 2, "pooler": "single", **changes.pop("captioner", {})}
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": text}
    return ModelConfig.model_validate(
        {"towers": towers, "captioner": {**captioner, "language_model": split or {}}, **changes}
    )


def built(folder: Path, split: dict[str, Any] | None = None, **changes: Any) -> DualEncoder:
    return build_model(config_of(folder, split, **changes)).eval()


def told(model: DualEncoder, tokens: Tensor, lengths: Tensor, images: Tensor) -> Tensor:
    """The mean of log p over the vocabulary, of each token but the first of each text."""
    made: Tensor = model({"image": Images(images), "text": Texts(tokens, lengths)}, OUTPUTS)["text_likelihood"]
    return made[:, 1]


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("gpt2", {}),
        ("llama", {"unimodal_layers": 1, "cross_every": 2}),
        ("opt", {"train": "lora", "lora": {"rank": 2, "targets": ["q_proj", "fc1"]}}),
    ],
)
@torch.no_grad()
def test_with_closed_gates_the_logits_are_the_language_models_own(
    tmp_path: Path, kind: str, split: dict[str, Any]
) -> None:
    theirs = save_language_model(tmp_path, kind)
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == (kind != "llama")
    model = built(tmp_path, split)
    assert model.notices == ()
    tokens, lengths = model.tokenizer(TEXTS)
    log_p = log_softmax(theirs(tokens, attention_mask=torch.ones_like(tokens)).logits, dim=-1)
    made = model({"image": Images(some_images(4)), "text": Texts(tokens, lengths)}, OUTPUTS)["text_likelihood"]
    for row, (length, found) in enumerate(zip(lengths.tolist(), made.split((lengths - 1).tolist()), strict=True)):
        expected = log_p[row, : length - 1]
        of_targets = expected.gather(1, tokens[row, 1:length, None])[:, 0]
        torch.testing.assert_close(found, torch.stack([of_targets, expected.mean(1)], 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["query", "class"])
@torch.no_grad()
def test_texts_see_no_image_before_the_decoder_and_no_later_token(tmp_path: Path, pool: str) -> None:
    save_language_model(tmp_path, "llama")
    model = built(tmp_path, text={"pool": pool})
    perturb(model)
    tokens, lengths = model.tokenizer(TEXTS[3:])
    images = some_images(2)
    texts = {"text": Texts(tokens, lengths)}
    first, second = (model({"image": Images(image[None]), **texts}, OUTPUTS) for image in images)
    assert torch.equal(first["text"], second["text"])
    assert not torch.allclose(first["text_likelihood"], second["text_likelihood"])
    before = told(model, tokens, lengths, images[:1])
    for place in (1, 4, int(lengths) - 2):
        changed = tokens.clone()
        changed[0, place] = 3 + (int(changed[0, place]) - 2) % 15
        after = told(model, changed, lengths, images[:1])
        torch.testing.assert_close(after[:place], before[:place], rtol=0, atol=1e-6)
        assert not torch.allclose(after[place:], before[place:])
        assert not torch.equal(model.encode_text(changed, lengths), first["text"])  # the embedding sees every token


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_padding_changes_neither_embedding_nor_likelihood(tmp_path: Path, pool: str) -> None:
    save_language_model(tmp_path)
    model = built(tmp_path, text={"pool": pool})
    perturb(model)
    assert model.text.may_shorten
    tokens, lengths = model.tokenizer(TEXTS[1:3])
    together, images = model.encode_text(tokens, lengths), some_images(2)
    likelihoods = told(model, tokens, lengths, images).split((lengths - 1).tolist())
    alone = model.tokenizer(TEXTS[2:3])
    longer = torch.nn.functional.pad(alone.tokens, (0, 16 - alone.tokens.shape[1]), value=5)
    for ids in (alone.tokens, longer):
        torch.testing.assert_close(model.encode_text(ids, alone.lengths)[0], together[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(told(model, ids, alone.lengths, images[1:]), likelihoods[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_query_and_the_gated_block_have_their_closed_forms(tmp_path: Path) -> None:
    """Attention of one head written out: softmax(q k / sqrt(d)) v, with pre-norms, additions and gates."""
    save_language_model(tmp_path)
    model = built(tmp_path).double()
    perturb(model)
    query: Any = model.text.query
    states = torch.randn(1, 5, 32, dtype=torch.float64)
    expected = layer_norm(_written_out(query.block, query.query[None], states[0, :3], (1.0, 1.0)), (32,))
    expected = expected * query.norm.weight + query.norm.bias
    torch.testing.assert_close(query(states, torch.tensor([3])), expected, rtol=0, atol=1e-12)
    block = Block(32, 4, 2.0, is_cross=True, gate=TanhGate).double()
    initialise_blocks([block], 32, 1)
    x, memory = torch.randn(1, 3, 32, dtype=torch.float64), torch.randn(1, 6, 32, dtype=torch.float64)
    assert torch.equal(block(x, memory), x)
    perturb(block)
    gates: Any = (block.ls_1, block.ls_2)
    for gate, value in zip(gates, (0.7, -0.4), strict=True):
        gate.gate.fill_(value)
    shares = (float(torch.tensor(0.7).double().tanh()), float(torch.tensor(-0.4).double().tanh()))
    torch.testing.assert_close(block(x, memory)[0], _written_out(block, x[0], memory[0], shares), rtol=0, atol=1e-7)


def _written_out(block: Any, x: Tensor, memory: Tensor, shares: tuple[float, float]) -> Tensor:
    def normed(rows: Tensor, norm: Any) -> Tensor:
        made: Tensor = layer_norm(rows, (len(norm.weight),)) * norm.weight + norm.bias
        return made

    parts = [normed(x, block.ln_1), *[normed(memory, block.ln_1_kv)] * 2]
    weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
    queries, keys, values = (linear(part, w, b) for part, w, b in zip(parts, weights, biases, strict=True))
    heads, attended = block.attn.heads, []
    for q, k, v in zip(*(rows.chunk(heads, 1) for rows in (queries, keys, values)), strict=True):
        attended.append((q @ k.T * q.shape[1] ** -0.5).softmax(1) @ v)
    x = x + shares[0] * block.attn.out_proj(torch.cat(attended, 1))
    hidden = gelu(block.mlp.c_fc(normed(x, block.ln_2)))
    made: Tensor = x + shares[1] * block.mlp.c_proj(hidden)
    return made


@torch.no_grad()
def test_a_token_that_may_look_at_no_image_depends_on_none(tmp_path: Path) -> None:
    save_language_model(tmp_path, "llama")
    model = built(tmp_path)
    perturb(model)
    tokens, lengths = model.tokenizer(TEXTS[3:])
    states = model.text_features(tokens, lengths)[1]
    assert states is not None
    mask = torch.ones(1, tokens.shape[1], 4, dtype=torch.bool)
    mask[:, :5] = False
    shown = [model.encode_image_and_tokens(image[None])[1] for image in some_images(2)]
    decoder: Any = model.decoder
    made: list[NextToken] = [decoder(states, image, mask=mask) for image in shown]
    assert torch.equal(made[0].states[:, :5], made[1].states[:, :5])
    assert not torch.allclose(made[0].states[:, 5:], made[1].states[:, 5:])
    whole: NextToken = decoder(states, shown[0], mask=torch.ones_like(mask))
    torch.testing.assert_close(whole.states, decoder(states, shown[0]).states)


@pytest.mark.parametrize("train", ["lora", "none"])
def test_the_language_model_stays_and_what_is_new_learns(tmp_path: Path, train: str) -> None:
    save_language_model(tmp_path, "gpt2", resid_pdrop=0.5)
    model = built(
        tmp_path, {"train": train, "lora": {"rank": 2, "dropout": 0.5}} if train == "lora" else {"train": train}
    )
    own = {name for name, _ in model.named_parameters() if name.startswith(("text.model.", "decoder.layers."))}
    own |= {"decoder.norm.weight", "decoder.norm.bias", "decoder.vocabulary.weight"}
    own = {name for name in own if "lora_" not in name}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    freeze_unreached(model, OUTPUTS)
    tokens, lengths = model.tokenizer(TEXTS)
    images = some_images(4)
    start = told(model, tokens, lengths, images).detach()
    model.train()
    drops = [part for part in model.modules() if isinstance(part, torch.nn.Dropout) and part.p == 0.5]
    assert {part.training for part in drops} == ({True, False} if train == "lora" else {False})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # gates and B, then what lies behind them
        made = model({"image": Images(images), "text": Texts(tokens, lengths)}, OUTPUTS)
        loss = (made["image"] * made["text"]).sum() - made["text_likelihood"][:, 0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert not changed & own
    new = {name for name in before if name.startswith(("text.", "decoder.")) and name not in own}
    assert {name for name in new - changed if not name.endswith(("bias", "ln_1.weight"))} == set()
    assert any("lora_A" in name for name in changed) == (train == "lora")
    model.eval()
    assert {part.training for part in drops} == {False}
    assert not torch.allclose(told(model, tokens, lengths, images), start)


def test_both_halves_train_unless_it_is_said(tmp_path: Path) -> None:
    save_language_model(tmp_path)
    model = built(tmp_path)
    assert freeze_unreached(model, OUTPUTS) == ["image.trunk.proj"]  # the pooler makes the embedding
    locked = built(tmp_path, lock={"text": "all"})
    names = {name for name, parameter in locked.named_parameters() if not parameter.requires_grad}
    assert names == {name for name, _ in locked.named_parameters() if name.startswith("text.model.")}


@torch.no_grad()
def test_a_checkpoints_configuration_and_files_rebuild_it(tmp_path: Path) -> None:
    save_language_model(tmp_path / "lm", "llama")
    model = built(tmp_path / "lm", {"train": "lora", "lora": {"rank": 2}})
    perturb(model)
    again = ModelConfig.model_validate(model.config.model_dump(mode="json"))
    assert again == model.config
    (tmp_path / "lm").rename(tmp_path / "gone")
    twin = build_model(again, load_pretrained=False, files=ForeignFiles(model.files)).eval()
    twin.load_state_dict(model.state_dict())
    texts, images = model.tokenizer(TEXTS), some_images(4)
    assert all(torch.equal(*pair) for pair in zip(twin.tokenizer(TEXTS), texts, strict=True))
    assert torch.equal(told(twin, *texts, images), told(model, *texts, images))
    assert torch.equal(twin.encode_text(*texts), model.encode_text(*texts))
    with pytest.raises(UserError, match="open_clip has no counterpart"):
        export_open_clip(model, tmp_path / "exported", images, TEXTS)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_merged_adapters_leave_the_same_model_without_them(tmp_path: Path, kind: str) -> None:
    save_language_model(tmp_path, kind)
    model = built(tmp_path, {"train": "lora", "lora": {"rank": 2}})
    perturb(model)
    texts, images = model.tokenizer(TEXTS), some_images(4)
    before = told(model, *texts, images), model.encode_text(*texts)
    plain = built(tmp_path)
    merge_adapters(model)
    torch.testing.assert_close(told(model, *texts, images), before[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode_text(*texts), before[1], rtol=0, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    twin = build_model(model.config, load_pretrained=False, files=ForeignFiles(model.files)).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(told(twin, *texts, images), told(model, *texts, images))
    trained = {name for name, parameter in twin.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(UserError, match="one language model"):
        model.drop_decoder()


@torch.no_grad()
def test_fresh_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    save_language_model(tmp_path, "llama")
    split = {"train": "lora", "lora": {"targets": ["q_proj", "v_proj", "o_proj", "up_proj"]}}
    first, second = (build_model(config_of(tmp_path, split), seed=7).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("pool", ["query", "class"])
@torch.no_grad()
def test_pools_are_those_of_a_tower_without_a_decoder_too(tmp_path: Path, pool: str) -> None:
    save_text_model(tmp_path, "gpt2")
    text = {"transformers": str(tmp_path), "context_length": 16, "pool": pool}
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": text}
    model = build_model(ModelConfig.model_validate({"towers": towers, "lock": {"text": "all"}})).eval()
    trained = {name for name, parameter in model.text.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in trained} >= {"projection", f"{pool}_token" if pool == "class" else pool}
    assert not any(name.startswith("model.") for name in trained)
    together = model.encode_text(*model.tokenizer(TEXTS))
    for row, one in enumerate(TEXTS):
        torch.testing.assert_close(model.encode_text(*model.tokenizer([one]))[0], together[row], rtol=0, atol=1e-6)
    if pool == "class":  # the library's own forward of the text's tokens and one more
        text_tower: Any = model.text
        ids = model.tokenizer(TEXTS[1:2]).tokens
        embedded = torch.cat([text_tower.model.wte(ids), text_tower.class_token.expand(1, 1, -1)], 1)
        state = text_tower.model(inputs_embeds=embedded).last_hidden_state[:, -1]
        expected = text_tower.projection(text_tower.pooled_norm(state))
        torch.testing.assert_close(normalize(expected)[0], together[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"split": {"unimodal_layers": 3}},
            r"^model\.captioner\.language_model\.unimodal_layers: found 3; the language model has 3 layers",
        ),
        (
            {"split": {"train": "lora", "lora": {"targets": ["q_prj"]}}},
            r"^model\.captioner\.language_model\.lora\.targets: unknown map 'q_prj'.*q_proj",
        ),
        ({"split": {"train": "none"}, "lock": {"text": "all"}}, r"^model\.lock\.text: .*train \(none\) locks"),
        ({"text": {"pool": "pooler"}}, r"pool: found pooler; a language model has query"),
        ({"text": {"context_length": 41}}, r"context_length: found 41"),
        ({"text": {"context_length": 40, "pool": "class"}}, r"context_length: found 40"),
        ({"captioner": {"pooler_heads": 5}}, r"model\.captioner"),
    ],
)
def test_what_does_not_go_together_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_language_model(tmp_path, "llama")
    with pytest.raises(UserError, match=message) as refused:
        built(tmp_path, **changes)
    assert "\n" not in str(refused.value)


def test_other_towers_and_incomplete_weights_are_refused(tmp_path: Path) -> None:
    save_text_model(tmp_path / "bert")
    with pytest.raises(UserError, match=r"model_type bert is no causal language model .*gpt2"):
        built(tmp_path / "bert")
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"text_cfg": TEXT}}
    with pytest.raises(UserError, match=r"language_model: the text tower is none; .*towers\.text"):
        build_model(ModelConfig.model_validate({"towers": towers, "captioner": {"language_model": {}}}))
    save_language_model(tmp_path / "lm", "llama", weights=False)
    transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "lm")).save_pretrained(
        tmp_path / "lm"
    )
    with pytest.raises(UserError, match=r"its files hold no weights for lm_head\.weight"):
        built(tmp_path / "lm")
    for field, value in (("preset", "tiny"), ("layers", 3), ("width", 32)):
        with pytest.raises(ValueError, match=rf"{field}: found {value}|layers: found 2"):
            config_of(tmp_path, captioner={field: value})
    with pytest.raises(ValueError, match="lora: found"):
        config_of(tmp_path, {"lora": {"rank": 4}})
    with pytest.raises(ValueError, match=r"lora\.targets\n.*at least 1 item"):  # none is no way to write the usual ones
        config_of(tmp_path, {"train": "lora", "lora": {"targets": []}})
