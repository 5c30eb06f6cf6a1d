"""Prompts of xDiT's whole list against diffusers' own encode_prompt: here, and on one and two ranks."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.text import RemoteTextEncoders
from tests import text_folders
from tests.tiny import relative_l2
from worker.text.encoders import TextEncoders
from worker.text.pipelines import PIPELINES

TOLERANCE = 1e-5
PROMPTS = {
    "short": "  A small Red circle, on the left",
    "empty": "",
    "escaped": "red &amp; small  \n circle &quot;on&quot; the left",
    "long": "a small red circle on the left; " * 40,
}
Folders = dict[str, tuple[Any, Path]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: text_folders.write(name, root) for name in text_folders.PARTS}


def opened(folder: Path) -> TextEncoders:
    encoders = TextEncoders(ModelSpec.of(folder, "text_encoders"), CPU)
    encoders.load()
    return encoders


def encoded(encoders: TextEncoders, *parts: tuple[str, float]) -> dict[str, Any]:
    with torch.inference_mode():
        return encoders.encode({name: [list(parts)] for name in encoders.describe()["encoders"]})


def default(pipeline: Any, name: str) -> Any:
    """What the pipeline's __call__ takes for an argument that is not given."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


@torch.no_grad()
def expected(pipeline: Any, prompt: str) -> dict[str, torch.Tensor]:
    """Context, pooled output and other entries of a CONDITIONING, by diffusers' pipeline."""
    name = type(pipeline).__name__
    length = {}
    if name not in ("LattePipeline", "HunyuanDiTPipeline"):
        length = {"max_sequence_length": default(pipeline, "max_sequence_length")}
    if name == "HunyuanDiTPipeline":
        call = {"device": CPU, "dtype": torch.float32, "do_classifier_free_guidance": False}
        first, _, mask, _ = pipeline.encode_prompt(prompt, **call, text_encoder_index=0)
        second, _, mask_2, _ = pipeline.encode_prompt(prompt, **call, text_encoder_index=1)
        return {
            "cond": first, "attention_mask": mask,
            "conditioning_mt5xl": second, "attention_mask_mt5xl": mask_2,
        }  # fmt: skip
    if name == "HunyuanVideoPipeline":
        context, pooled, mask = pipeline.encode_prompt(prompt, device=CPU, **length)
        return {"cond": context, "pooled": pooled, "attention_mask": mask}
    unguided = {"do_classifier_free_guidance": False, "device": CPU}
    if name == "SanaPipeline":
        words = default(pipeline, "complex_human_instruction") if prompt else None
        unguided["complex_human_instruction"] = words
    context, *masks = pipeline.encode_prompt(prompt, **unguided, **length)
    if name == "MochiPipeline":
        return {"cond": context, "attention_mask": masks[0]}
    if name.startswith(("PixArt", "Sana")):
        # What its transformer does not attend to.
        context = context[:, masks[0][0].bool()]
    return {"cond": context}


def check(ours: dict[str, Any], theirs: dict[str, torch.Tensor]) -> None:
    """The same entries, the same numbers."""
    flat = {"cond": ours["cond"], **ours["options"]}
    flat |= {} if ours["pooled"] is None else {"pooled": ours["pooled"]}
    assert flat.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert flat[name].shape == tensor.shape
        if "mask" in name:
            assert flat[name].dtype == torch.int64
            assert torch.equal(flat[name], tensor.long())
        else:
            assert relative_l2(flat[name], tensor) <= TOLERANCE


@pytest.mark.parametrize("name", text_folders.PARTS)
def test_prompts_are_encoded_as_diffusers_does(folders: Folders, name: str):
    pipeline, folder = folders[name]
    encoders = opened(folder)
    lengths = set()
    for prompt in PROMPTS.values():
        theirs = expected(pipeline, prompt)
        check(encoded(encoders, (prompt, 1.0)), theirs)
        lengths.add(theirs["cond"].norm().item())
    assert len(lengths) == len(PROMPTS), "every prompt is another one"


@pytest.mark.parametrize("ranks", [2, 1])
def test_on_ranks(folders: Folders, ranks: int):
    for pipeline, folder in folders.values():
        layout = ParallelConfig(cfg_parallel_degree=ranks)
        remote = RemoteTextEncoders(ModelSpec.of(folder, "text_encoders"), layout)
        prompt = PROMPTS["short"]
        prompts = {name: [[(prompt, 1.0)]] for name in remote.load()["encoders"]}
        context, pooled, options = remote.encode(prompts)
        check({"cond": context, "pooled": pooled, "options": options}, expected(pipeline, prompt))


def test_every_pipeline_of_the_list_is_known_to_diffusers():
    for name in PIPELINES:
        assert hasattr(diffusers, name)


# ---------------------------------------------------------------------- what diffusers does not have


@pytest.mark.parametrize("name", text_folders.PARTS)
def test_a_weight_of_one_changes_nothing_and_another_one_its_words_only(folders: Folders, name: str):
    encoders = opened(folders[name][1])
    plain = encoded(encoders, ("a small red circle", 1.0))
    same = encoded(encoders, ("a small ", 1.0), ("red", 1.0), (" circle", 1.0))
    heavy = encoded(encoders, ("a small ", 1.0), ("red", 1.5), (" circle", 1.0))

    assert torch.equal(same["cond"], plain["cond"])
    assert heavy["cond"].shape == plain["cond"].shape
    changed = (heavy["cond"] != plain["cond"]).any(-1)[0]
    assert 0 < changed.sum() <= 4  # "red" in at most as many tokens
    empty = encoded(encoders, ("", 1.0))
    if empty["cond"].shape == plain["cond"].shape and name != "MochiPipeline":  # whose empty prompt is zeros
        towards = empty["cond"] + 1.5 * (plain["cond"] - empty["cond"])
        assert relative_l2(heavy["cond"][:, changed], towards[:, changed]) <= TOLERANCE


def test_what_is_left_out_is_said(folders: Folders, caplog: pytest.LogCaptureFixture):
    _, folder = folders["CogVideoXPipeline"]
    remote = RemoteTextEncoders(ModelSpec.of(folder, "text_encoders"), ParallelConfig())
    remote.encode({"t5xxl": [[("red " * 225, 1.0)]]})
    assert not caplog.messages
    remote.encode({"t5xxl": [[("red " * 225 + "circle", 1.0)]]})
    assert (
        "has 1 tokens more than the 226 that text_encoder takes; they were left out: 'circle'" in caplog.text
    )


def test_no_text_encoder_is_said_when_a_prompt_comes(tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    remote = RemoteTextEncoders(ModelSpec.of(tmp_path, "text_encoders"), ParallelConfig())
    assert remote.load() == {"encoders": {}}
    with pytest.raises(InvalidInput, match="is a DiTPipeline, which has no text encoder"):
        remote.encode({})


def test_a_vocabulary_of_sentencepiece(folders: Folders, tmp_path: Path):
    """What most folders with a T5 have: a spiece.model alone."""
    pytest.importorskip("google.protobuf", reason="reads spiece.model; a requirement of the pack")
    import sentencepiece
    import transformers

    folder = shutil.copytree(folders["CogVideoXPipeline"][1], tmp_path / "folder")
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    words = [f"{word} {letter}" for word in text_folders.WORDS for letter in text_folders.LETTERS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(folder / "tokenizer" / "spiece"), vocab_size=80,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    assert (folder / "tokenizer" / "spiece.model").is_file()
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 226}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spiece.model"))
    ids = [*processor.encode("red circle"), 1]
    with torch.no_grad():
        states = encoder(torch.tensor([ids + [0] * (226 - len(ids))])).last_hidden_state

    ours = encoded(opened(folder), ("red circle", 1.0))

    assert relative_l2(ours["cond"], states) <= TOLERANCE


# ---------------------------------------------------------------------- folders that are wrong


def rewritten(folder: Path, **entries: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | entries))


def remove(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


def without_whole(folder: Path, tokenizer: str) -> None:
    """A vocabulary in a format that only its class can read."""
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "vocab.txt")
    rewritten(folder, tokenizer=["transformers", tokenizer])


WRONG = {
    "no encoder": (
        lambda f: shutil.rmtree(f / "text_encoder"),
        "lacks the folder text_encoder that its model_index.json names; download the complete",
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "lacks the folder tokenizer that its"),
    "no weights": (
        lambda f: remove(f, "text_encoder/*.safetensors"),
        r"no \.safetensors file in .*text_encod",
    ),
    "no vocabulary": (lambda f: remove(f, "tokenizer/*"), r"holds none of tokenizer\.json, spiece\.model"),
    "null": (
        lambda f: rewritten(f, text_encoder=[None, None]),
        r"names \[None, None\] as text_encoder, where a class of transformers is needed: download",
    ),
    "another class": (
        lambda f: rewritten(f, text_encoder=["transformers", "LlamaModel"]),
        "names 'LlamaModel' as text_encoder, where this version reads T5EncoderModel: download",
    ),
    "no tokenizer's class": (
        lambda f: without_whole(f, "T5EncoderModel"),
        "names 'T5EncoderModel' as tokenizer, which is no tokenizer of transformers .*: update",
    ),
    "an unknown class": (
        lambda f: without_whole(f, "NewTokenizer"),
        "names 'NewTokenizer' as tokenizer, which is no tokenizer of transformers .*: update",
    ),
    "damaged vocabulary": (
        lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"),
        r"tokenizer cannot be read \(.*\); download it again",
    ),
    "an unknown pipeline": (
        lambda f: rewritten(f, _class_name="KandinskyPipeline"),
        "is a KandinskyPipeline; this version reads .*CogVideoXPipeline.*stock CLIP loader",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_folder_is_named(folders: Folders, tmp_path: Path, what: str):
    spoil, words = WRONG[what]
    folder = shutil.copytree(folders["CogVideoXPipeline"][1], tmp_path / "folder")
    spoil(folder)
    with pytest.raises(InvalidInput, match=words):
        opened(folder)


def changed(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    "change", [lambda t: t.pop(QUERY), lambda t: t.update({QUERY: torch.zeros(8, 8)})], ids=["no", "another"]
)
def test_a_missing_tensor_is_named(folders: Folders, tmp_path: Path, change: Any):
    """Or one of another shape: transformers alone would draw either at random."""
    folder = shutil.copytree(folders["CogVideoXPipeline"][1], tmp_path / "folder")
    changed(folder / "text_encoder" / "model.safetensors", change)
    with pytest.raises(InvalidInput, match=rf"lacks 1 of the tensors of T5EncoderModel, or .*{QUERY} first"):
        opened(folder)


def test_what_nobody_asks_for_may_be_missing(folders: Folders, tmp_path: Path):
    pipeline, folder = folders["HunyuanDiTPipeline"]
    folder = shutil.copytree(folder, tmp_path / "folder")
    changed(
        folder / "text_encoder" / "model.safetensors",
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("pooler.")],
    )
    prompt = PROMPTS["short"]
    check(encoded(opened(folder), (prompt, 1.0)), expected(pipeline, prompt))


def test_a_damaged_configuration_is_named(folders: Folders, tmp_path: Path):
    folder = shutil.copytree(folders["CogVideoXPipeline"][1], tmp_path / "folder")
    for text in ("{", '{"model_type": "t5", "num_layers": "two"}'):
        (folder / "text_encoder" / "config.json").write_text(text)
        with pytest.raises(
            InvalidInput, match=r"config\.json is none of a T5EncoderModel .*download it again"
        ):
            opened(folder)
