"""Nothing in a file is a program, a command or a way to other files, unless its reader says so."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from launch.main import run as run_vlm
from launch.model_source import empty_model_of, load_model
from launch.recipe_file import read_recipe
from tests.launch.saved import save_checkpoint
from tests.vlm.model.hugging_face import save_text_model, save_tokenizer, save_vision_model
from tests.vlm.model.tiny import TEXT, TEXTS, VIT, architecture, some_images, tiny_model
from vlm.checkpoint.format import Checkpoint
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.programs import imported_towers

CODE = "from pathlib import Path\nPath({ran!r}).touch()\nclass Evil: pass\n"
PROGRAMS: list[dict[str, Any]] = [
    {"objective": {"evil:Term": 1.0}},
    {"objective": {"near": {"kind": "evil:Term"}}},
    {"providers": {"near": {"kind": "evil:Provider"}}},
    {"objective": {"evil-mod.x:Term.inner": {"weight": 1.0}}},
    {"providers": {"évil:Term": {}}},
    {"data": {"sources": {"a": {"shards": ["a.tar", " pipe:touch ran"]}}}},
    {"evaluate": {"e": {"kind": "retrieval", "shards": "pipe:touch ran"}}},
    {"evaluate": {"e": {"kind": "evil:Config", "shards": "a.tar"}}},
    {"model": {"towers": {"embed_dim": 8, "image": {"evil:Tower": {}}, "text": {"text_cfg": {}}}}},
    {"model": {"towers": {"text": {"evil:Tower": None}}}},
    {"base": "below.yaml"},
]


@pytest.mark.parametrize("values", PROGRAMS)
def test_a_program_in_a_recipe_is_refused_by_its_key_and_runs_with_trust(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    (tmp_path / "below.yaml").write_text(yaml.safe_dump({"data": {"root": "pipe:touch ran"}}))
    path = tmp_path / "found.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"found.yaml: .* would run as a program; --trust runs") as caught:
        read_recipe(str(path))
    assert next(iter(values)) in str(caught.value) or "data.root" in str(caught.value)
    assert read_recipe(str(path), trust=True).values


def test_what_the_user_types_is_no_file_and_what_an_override_replaces_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"objective": {"clip": 1.0}, "data": {"root": "pipe:cat x"}}))
    typed = read_recipe(str(path), ["objective={'mine:Term': 1.0}", "data.root=/data"]).values
    assert typed["objective"] == {"mine:Term": 1.0}
    with pytest.raises(UserError, match=r"data\.root"):
        read_recipe(str(path), ["objective={'mine:Term': 1.0}"])


def test_the_command_line_refuses_a_class_from_a_recipe_before_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(CODE.format(ran=str(ran)))
    (tmp_path / "found.yaml").write_text(yaml.safe_dump({"objective": {"evil:Evil": 1.0}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for command in (["train", "found.yaml"], ["verify-gradients", "found.yaml"]):
        monkeypatch.setattr("sys.argv", ["vlm", *command])
        with pytest.raises(SystemExit) as caught:
            run_vlm()
        assert caught.value.code == 2
        assert "'evil:Evil' would run as a program; --trust" in capsys.readouterr().err
    assert not ran.exists()


def _same(model: DualEncoder, other: DualEncoder) -> bool:
    model.eval()
    with torch.no_grad():
        return torch.equal(model.encode_text(*model.tokenizer(TEXTS)), other.encode_text(*other.tokenizer(TEXTS)))


def test_a_tower_of_ones_own_in_a_checkpoint_is_imported_with_trust_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "tests.vlm.model.own_towers:Own"
    towers = {"embed_dim": 8, "image": {f"{own}Image": {}}, "text": {f"{own}Text": {}}}
    model = build_model(ModelConfig.model_validate({"towers": towers}))
    assert _same(model, load_model(str(save_checkpoint(tmp_path / "run", model)), trust=True))

    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(CODE.format(ran=str(ran)))
    monkeypatch.syspath_prepend(tmp_path)
    fields = model.config.model_dump(mode="json")
    fields["towers"]["text"] = {"evil:Evil": {}}
    folder = save_checkpoint(tmp_path / "other", model, fields)
    with pytest.raises(
        UserError, match=r"manifest\.json: model\.towers\.image: .* would run as a program; --trust runs"
    ):
        load_model(str(folder))
    checkpoint, recipes = Checkpoint(folder), imported_towers({"model": model.config.model_dump(mode="json")})
    with pytest.raises(UserError, match=r"model\.towers\.text: 'evil:Evil' would run as a program"):
        empty_model_of(checkpoint, trust=True, trusted=recipes)  # a run goes on with the classes of its recipe alone
    assert not ran.exists()
    with pytest.raises(UserError, match="text tower 'evil:Evil' is not a subclass of"):
        empty_model_of(checkpoint, trust=True)
    assert ran.exists()


def test_a_checkpoint_made_hostile_runs_nothing_and_reads_nothing_else(tmp_path: Path) -> None:
    """Its tokenizer's settings name code, and its model options that would fetch some: nothing of it is followed."""
    source = tmp_path / "source"
    source.mkdir()
    size = save_tokenizer(source)
    text = {"hf_tokenizer_name": str(source), "vocab_size": size, "pool_type": "eos", "eos_id": 3}
    model = tiny_model(architecture=architecture(text=text))
    settings = json.loads(model.files["tokenizer.tokenizer_config.json"])
    ran = tmp_path / "ran"
    (source / "evil.py").write_text(CODE.format(ran=str(ran)))
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "vocab_file": "/etc/passwd"}
    model.files["tokenizer.tokenizer_config.json"] = json.dumps(settings).encode()
    model.files["tokenizer.../../planted"] = b"planted"
    folder = save_checkpoint(tmp_path / "run", model)
    shutil.rmtree(source)
    assert _same(model, load_model(str(folder)))
    assert not ran.exists()
    assert not list(tmp_path.rglob("planted"))

    for name, value, words in (
        ("tokenizer_kwargs", {"trust_remote_code": True}, "tokenizer_kwargs: 'trust_remote_code' is not taken"),
        ("tokenizer_kwargs", {"bpe_path": "/etc/passwd"}, "tokenizer_kwargs: 'bpe_path' is not taken"),
    ):
        assert model.config.towers is not None
        fields = model.config.model_dump(mode="json")
        fields["towers"]["text"]["text_cfg"][name] = value
        with pytest.raises(UserError, match=re.escape(words)):
            load_model(str(save_checkpoint(tmp_path / "other", model, fields)))


def test_a_checkpoint_that_keeps_no_files_needs_trust_to_follow_the_names_in_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_vision_model(source)
    towers = {"embed_dim": 24, "image": {"transformers": str(source), "pool": "first"}, "text": {"text_cfg": TEXT}}
    model = build_model(ModelConfig.model_validate({"towers": towers}))
    model.files = {}
    folder = save_checkpoint(tmp_path / "run", model)
    with pytest.raises(UserError, match=r"image.config.json does not lie with it but in .*source.*--trust"):
        load_model(str(folder))
    assert _same(model, load_model(str(folder), trust=True))


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp/model", "../model", "hf_hub:a/b"])
def test_timm_names_that_are_addresses_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"timm_model_name: .* is no name of timm's own"):
        ModelConfig.model_validate({"architecture": architecture({"timm_model_name": name, "image_size": 32})})


def _hostile(folder: Path, **changes: Any) -> dict[str, Any]:
    """A text model's folder whose configuration is changed."""
    save_text_model(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))
    return {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"transformers": str(folder), "context_length": 16}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, "model_type 'evil' is not transformers' own"),
        ({"backbone": "hf-hub:someone/pickle", "use_pretrained_backbone": True}, "backbone: .* leads out of the model"),
        ({"nested": {"name": "/etc/passwd"}}, "nested.name: .* leads out of the model"),
        ({"quantization_config": {"quant_method": "x"}}, "quantised weights are not read"),
    ],
)
def test_configurations_that_lead_out_are_refused_by_their_key(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    towers = _hostile(tmp_path, **changes)
    (tmp_path / "evil.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    with pytest.raises(UserError, match=words) as caught:
        build_model(ModelConfig.model_validate({"towers": towers}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_that_transformers_knows_is_left_out(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    names = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    towers = _hostile(tmp_path, auto_map=names, attn_implementation="someone/kernel", _name_or_path="/etc")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": names}))
    (tmp_path / "evil.py").write_text(CODE.format(ran=str(ran)))
    model = build_model(ModelConfig.model_validate({"towers": towers}))
    assert not ran.exists()
    assert b"evil" not in b"".join(model.files.values())
    assert model.eval().encode_image(some_images()).shape == (3, 24)


class Evil:
    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> Any:
        return Path.touch, (self._ran,)


def test_pickles_and_parts_of_models_are_not_read(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    towers = _hostile(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Evil(ran)}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="its weights are a pickle of more than tensors"):
        build_model(ModelConfig.model_validate({"towers": towers}))
    assert not ran.exists()
    towers = _hostile(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(UserError, match="holds an adapter, not a whole model"):
        build_model(ModelConfig.model_validate({"towers": towers}))
    towers = _hostile(tmp_path / "split")
    (tmp_path / "split" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "../adapter/model.safetensors"}}
    (tmp_path / "split" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names files outside its folder"):
        build_model(ModelConfig.model_validate({"towers": towers}))


def test_weights_that_are_missing_are_named_and_not_drawn(tmp_path: Path) -> None:
    towers = _hostile(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"its files hold no weights for embeddings.word_embeddings.weight"):
        build_model(ModelConfig.model_validate({"towers": towers}))


def test_a_folder_of_open_clip_names_no_other_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    save_text_model(elsewhere)
    text = {"hf_model_name": str(elsewhere), "hf_tokenizer_name": str(elsewhere), "context_length": 16}
    exported = tmp_path / "exported"
    exported.mkdir()
    content = {"model_cfg": {**architecture(), "text_cfg": text}, "preprocess_cfg": {}}
    (exported / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"does not lie with it but in .*elsewhere.*--trust"):
        load_model(str(exported))
