"""GGUF files of models, against the models: read back by Transformers, which shares no code with what wrote them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import toys
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from toys import refused
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typer.testing import CliRunner

from evolver.checkpoints.gguf import keys, reader, writer
from evolver.checkpoints.weights import Checkpoint
from evolver.commands.cli import app
from evolver.driver import deliver
from evolver.errors import BadInput
from evolver.runs.history import read_history
from evolver.storage import storage_at

pytestmark = pytest.mark.whole

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
# Name → tokenizer, and configuration.
KINDS = {
    "llama": ("gpt-2", {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 5e4, **SHAPE}),
    "llama, own head, more rows than tokens": ("smollm", {"model_type": "llama", "more": 13, **SHAPE}),
    "llama 3": ("llama-bpe", {"model_type": "llama", "rope_parameters": LLAMA3, **SHAPE}),
    "llama, wide heads": ("pieces", {"model_type": "llama", "head_dim": 32, "rope_parameters": LINEAR, **SHAPE}),
    "mistral": ("pieces", {"model_type": "mistral", "sliding_window": None, **SHAPE}),
    "qwen2": ("qwen2", {"model_type": "qwen2", "tie_word_embeddings": True, **SHAPE}),
    "qwen2, yarn": ("qwen2", {"model_type": "qwen2", "rope_parameters": YARN, **SHAPE}),
    "qwen3": ("qwen2", {"model_type": "qwen3", "head_dim": 128, **SHAPE}),
    "gpt2": ("gpt-2", {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}),
}
TEXTS = [
    "Question: is the red house 1234?\nAnswer:", "I'm here, WE'LL see\r\n\r\n  \tthree   spaces ", "x=1;y+=22 // a_b",
    "Straße, élan, 你好 世界, привет 🙂", "<think>aloud</think> mixed1abc2 3d", "a", "1", "don’t “quote”… — ½²Ⅷ",
]  # fmt: skip


def tokenizer(family):
    """A tokenizer of a few hundred tokens that is defined as those of a family of models are."""
    if family == "pieces":
        return _pieces()
    inner = Tokenizer(models.BPE(ignore_merges=family == "llama-bpe"))
    digits = r"\p{N}{1,3}" if family == "llama-bpe" else r"\p{N}"
    cut = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
    cut += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
    }.get(family) or pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    if family == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    first = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=380, special_tokens=first, initial_alphabet=alphabet, show_progress=False))  # fmt: skip  # noqa: E501
    if family == "llama-bpe":
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    words = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    words.add_tokens(["<think>"])
    words.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    return words


def _pieces():
    """What SentencePiece makes of pairs, with bytes for what is in no token."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    first = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    inner.train_from_iterator([t.replace("你好", "") for t in TEXTS] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=first, show_progress=False))  # fmt: skip  # noqa: E501
    raw = json.loads(inner.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]
    inner = Tokenizer.from_str(json.dumps(raw))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(kind)``: the folder of a model of that kind."""
    home = tmp_path_factory.mktemp("kinds")

    def make(kind):
        folder = home / kind.replace(" ", "-")
        if not folder.exists():
            family, raw = KINDS[kind]
            words = tokenizer(family)
            torch.manual_seed(0)
            raw = {"vocab_size": len(words) + raw.get("more", 0), "initializer_range": 0.1, **raw}
            ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw, **ids))
            for parameter in model.parameters():
                parameter.data += 0.01 * torch.randn_like(parameter)
            model.save_pretrained(folder)
            words.save_pretrained(folder)
        return folder

    return make


def source(folder, **config):
    checkpoint = Checkpoint(folder, "model")
    tensors = [(n, checkpoint.tensor(n)) for n in checkpoint.names()]
    return writer.FileContent(
        {**checkpoint.config, **config}, checkpoint.headers, tensors, folder, "toy", "made of air"
    )


def written(folder, kind, file):
    model = source(folder)
    done = writer.write_gguf(model, kind, file)
    writer.verify(file, done)
    return model, done


def fields(file):
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def rounded(tensor, kind):
    """A tensor in a type that rounds every number by itself."""
    return tensor.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]).float()


def step(tensor):
    """What q8_0 may be off, for every scalar: half a step, of which 127 reach to the block's largest, and as much as
    the step's own rounding to float16 makes of 127 of them.
    """
    largest = tensor.reshape(-1, 32).abs().max(1, keepdim=True).values / 127
    return ((0.5 + 127 / 2048) * largest).expand(-1, 32).reshape(tensor.shape) + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_was_written(made, kind, tmp_path):
    for kept in ("f32", "f16", "bf16", "q8_0") if kind == "llama" else ("f32", "q8_0"):
        model, _ = written(made(kind), kept, file := tmp_path / f"{kept}.gguf")
        writer.read_back(file, tmp_path / kept, torch.float32)
        found = Checkpoint(tmp_path / kept, "file")
        assert found.names() == [n for n, _ in model.tensors]
        for name, tensor in model.tensors:
            whole = tensor.ndim == 1 or name.endswith("wpe.weight")
            if kept != "q8_0" or whole:
                assert torch.equal(found.tensor(name), rounded(tensor, "f32" if whole else kept)), name
                continue
            ours, theirs = tensor, found.tensor(name)
            if model.config["model_type"] == "gpt2" and name.endswith(writer.TURNED):
                ours, theirs = ours.T, theirs.T
            assert bool(((ours - theirs).abs() <= step(ours)).all()), name
        assert keys.scaling(AutoConfig.from_pretrained(tmp_path / kept)) == keys.scaling(
            AutoConfig.from_pretrained(made(kind))
        )
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (made(kind), tmp_path / "f32"))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "llama 3", "mistral", "qwen2"])
def test_its_tokenizer_numbers_texts_as_the_model_s_does(made, kind, tmp_path):
    """Not asked of smollm's: Transformers does not know this name."""
    written(made(kind), "f16", tmp_path / "m.gguf")
    ours, theirs = (
        AutoTokenizer.from_pretrained(made(kind)),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"),
    )
    for text in TEXTS:
        assert theirs(text).input_ids == ours(text).input_ids, text
    assert theirs.chat_template == ours.chat_template
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)


def test_the_keys_say_what_a_reader_needs(made, tmp_path):
    written(made("llama, own head, more rows than tokens"), "q8_0", tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    tokens = tokenizer("smollm")
    rows = len(tokens) + 13
    assert found["general.architecture"] == "llama"
    assert found["general.file_type"] == 7
    assert (found["general.name"], found["general.description"]) == ("toy", "made of air")
    assert found["llama.vocab_size"] == rows == len(found["tokenizer.ggml.tokens"])
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{rows - 1}]"
    assert found["tokenizer.ggml.token_type"][-14:] == [4] + [5] * 13  # looked for whole, and unused
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # special, and plain
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["llama.context_length"] == 256
    written(made("llama 3"), "f16", tmp_path / "3.gguf")
    found = fields(tmp_path / "3.gguf")
    assert (found["tokenizer.ggml.pre"], found["tokenizer.ggml.add_bos_token"]) == ("llama-bpe", True)
    assert found["llama.rope.freq_base"] == 5e5
    written(made("mistral"), "f16", tmp_path / "pieces.gguf")
    found = fields(tmp_path / "pieces.gguf")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # unknown, special, and a byte


@pytest.mark.parametrize("head", [8, 64, 128])
def test_llama_3_s_frequencies_are_transformers(head):
    raw = {"model_type": "llama", **SHAPE, "head_dim": head, "rope_parameters": LLAMA3}
    raw |= {"max_position_embeddings": 16384, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}}
    config = AutoConfig.for_model(**raw)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, head, 2) / head)
    assert torch.allclose(plain / torch.from_numpy(keys.rope_factors(config)), scaled, rtol=1e-5)


@pytest.mark.parametrize("old", [2048, 8192])
@pytest.mark.parametrize("head", [64, 128])
def test_llama_3_s_settings_follow_from_its_frequencies(old, head):
    rope = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": old}
    raw = {"model_type": "llama", **SHAPE, "head_dim": head, "max_position_embeddings": 16384, "rope_parameters": rope}
    factors = keys.rope_factors(AutoConfig.for_model(**raw))
    assert keys.scaling_in({"rope.freq_base": 5e5}, factors) == rope
    with pytest.raises(ValueError, match="not those of Llama 3"):
        keys.scaling_in({"rope.freq_base": 5e5}, factors * 1.01)


def test_a_matrix_that_cannot_be_cut_into_blocks_is_float16(made, tmp_path):
    raw = {**KINDS["llama"][1], "intermediate_size": 40}
    KINDS["narrow"] = ("gpt-2", raw)
    model, done = written(made("narrow"), "q8_0", tmp_path / "m.gguf")
    assert done.notes == ("2 matrices are f16: their rows cannot be cut into blocks of 32, as q8_0 is",)
    writer.read_back(tmp_path / "m.gguf", tmp_path / "m", torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(Checkpoint(tmp_path / "m", "").tensor(name), rounded(dict(model.tensors)[name], "f16"))
    huge = [(n, t * 1e9 if n == name else t) for n, t in model.tensors]
    model = writer.FileContent(model.config, model.infos, huge, model.tokenizer, "", "")
    refused(lambda: writer.write_gguf(model, "q8_0", tmp_path / "x"), name, "is no f16", "write bf16 or f32")


def test_a_window_is_where_the_file_ends(made, tmp_path):
    done = writer.write_gguf(source(made("mistral"), sliding_window=100), "f16", tmp_path / "m.gguf")
    assert fields(tmp_path / "m.gguf")["llama.context_length"] == 100
    assert "takes 100 tokens" in done.notes[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt_neox"}, "a gpt_neox model cannot be written, only llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type dynamic, factor 2",
        ),
        ({"rope_parameters": {**YARN, "beta_fast": 16.0}}, "beta_fast 16"),
        (
            {"num_hidden_layers": 1},
            "model.layers.1.input_layernorm.weight cannot be put into the file of a llama model",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused(made, tmp_path, change, said):
    refused(
        lambda: writer.write_gguf(source(made("llama"), **change), "f16", tmp_path / "m"), "--gguf: ", said, "llama.cpp"
    )


def broken(made, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(made("llama"), folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def other_cut(raw):
    raw["pre_tokenizer"]["add_prefix_space"] = True


def lower_case(raw):
    raw["normalizer"] = {"type": "Lowercase"}


def other_end(raw):
    raw["post_processor"] = json.loads(processors.TemplateProcessing(single="$A <pad>", special_tokens=[("<pad>", 2)]).__getstate__())  # fmt: skip  # noqa: E501


def words_only(raw):
    raw["model"] = {"type": "WordLevel", "vocab": raw["model"]["vocab"], "unk_token": "<pad>"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_cut, "splits texts in another way than gpt-2, smollm"), (lower_case, "splits texts in another way than"),
        (other_end, "other tokens around a text"), (words_only, "is a WordLevel and not BPE"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_would_become_another_is_refused(made, tmp_path, change, said):
    folder = broken(made, tmp_path, change)
    refused(lambda: writer.write_gguf(source(folder), "f16", tmp_path / "m"), "--gguf: ", folder, said)


def test_a_model_without_a_tokenizer_is_refused(made, tmp_path):
    folder = broken(made, tmp_path, lambda raw: None)
    (folder / "tokenizer.json").unlink()
    refused(lambda: writer.write_gguf(source(folder), "f16", tmp_path / "m"), folder, "no fast tokenizer", "save one")


def test_a_changed_bit_is_found(made, tmp_path):
    _, done = written(made("llama"), "q8_0", tmp_path / "m.gguf")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[-100] ^= 1
    (tmp_path / "m.gguf").write_bytes(content)
    refused(
        lambda: writer.verify(tmp_path / "m.gguf", done),
        "differs from what was written when it is read back",
        "check the disk",
    )


def test_the_types_are_those_of_the_package():
    assert list(writer.types()) == ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
    """The folder of a finished run."""
    file = make_config(tmp_path_factory.mktemp("config"), {"budget.candidates": 6})
    return toys.run_here(file, tmp_path_factory.mktemp("results"))


def deliver_one(run, out, kind="q8_0", wanted=None):
    lines = []
    deliver.deliver_gguf(storage_at(run), out, wanted, kind, lines.append)
    return lines


def test_a_run_s_best_model_is_one_file(run, tmp_path):
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out.gguf"), "--gguf", "q8_0"])
    assert done.exit_code == 0, done.output
    assert (
        f"{tmp_path / 'out.gguf'}: 20 tensors as q8_0, each read back and compared; loaded by Transformers"
        in done.output
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert fields(tmp_path / "out.gguf")["general.name"] == "toy"
    recipe = read_history(storage_at(run)).best[0].recipe.id
    assert recipe in fields(tmp_path / "out.gguf")["general.description"]


def test_in_float32_it_is_the_exported_model(run, tmp_path):
    out = tmp_path / "out.gguf"
    (line,) = deliver_one(run, out, "F32")
    assert line.endswith("the model gives the answers in the ledger on 40 of 40 dev items")
    reader.convert(out, tmp_path / "back", "x")
    one, two = Checkpoint(tmp_path / "back", ""), Checkpoint(run / "best", "")
    assert one.names() == two.names()
    assert all(torch.equal(one.tensor(n), two.tensor(n)) for n in one.names())
    other = tmp_path / "other.gguf"
    (line,) = deliver_one(run, other, "bf16", "3")
    assert toys.rows(run)["search", 3]["recipe_id"] in fields(other)["general.description"]


@pytest.mark.parametrize(
    ("patched", "reason"),
    [
        ("transformers.AutoModelForCausalLM.from_pretrained", "this type is unknown"),
        ("evolver.checkpoints.gguf.reader._check_complete", "it lacks a tensor"),
    ],
)
def test_why_a_file_cannot_be_read_back_is_said(made, tmp_path, monkeypatch, patched, reason):
    _, _ = written(made("llama"), "q8_0", file := tmp_path / "m.gguf")
    if "AutoModel" in patched:
        monkeypatch.setattr(patched, lambda *_, **__: (_ for _ in ()).throw(NotImplementedError(reason)))
    else:
        error = BadInput(f"--gguf: {file} lacks a tensor; give the whole model.")
        monkeypatch.setattr(patched, lambda *_: (_ for _ in ()).throw(error))
    refused(
        lambda: writer.read_back(file, tmp_path / "m", torch.float32),
        "--gguf: Transformers does not read the architecture llama in the type MOSTLY_Q8_0",
        f"cannot be checked ({reason})",
        "leave --gguf out",
    )


@pytest.mark.parametrize("stage", ["write", "verify", "read_back"])
def test_what_is_interrupted_leaves_nothing(run, tmp_path, monkeypatch, stage):
    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out.gguf"
    monkeypatch.setattr(writer, stage if stage != "write" else "_digest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        deliver_one(run, out)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_sentence(run, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    refused(lambda: deliver_one(run, out, "q4_k_m"), "--gguf: ", "cannot compute 'q4_k_m'", "q8_0", "llama-quantize")
    refused(lambda: deliver_one(run, tmp_path), tmp_path, "this is not a file", "name the file")
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    refused(lambda: deliver_one(run, out), out, "No space left on device", "free disk space")
    monkeypatch.setattr(keys, "ARCHITECTURES", {"gpt2": "gpt2"})
    refused(lambda: deliver_one(run, out), "a llama model cannot be written, only gpt2", "leave --gguf out")
    prepared = deliver.prepare_run(storage_at(run))
    model = prepared.config.model.model_copy(update={"kind": "classifier"})
    classifier = replace(prepared, config=prepared.config.model_copy(update={"model": model}))
    monkeypatch.setattr(deliver, "prepare_run", lambda _: classifier)
    refused(
        lambda: deliver_one(run, out),
        "--gguf: ",
        "this run merges models of the kind classifier",
        "leave the option out",
    )
    monkeypatch.setattr("importlib.metadata.version", missing)
    refused(lambda: deliver_one(run, out), "--gguf: ", out, "the package gguf", "pip install 'evolver[gguf]'")
    assert list(tmp_path.iterdir()) == []


def missing(name):
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


@pytest.mark.parametrize(("given", "said"), [(["--lora", "4"], "--lora"), (["--energy", "1"], "--lora"), (["--delta"], "--delta")])  # fmt: skip  # noqa: E501
def test_one_form_at_a_time(tmp_path, given, said):
    done = CliRunner().invoke(app, ["export", "run", str(tmp_path / "out"), "--gguf", "f16", *given])
    assert (
        str(done.exception) == f"{said}, --gguf: a model is exported in one form at a time; give one of these options."
    )
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_what_is_uploaded(run, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append(name if exist_ok else None)

        def upload_file(self, **given):
            calls.append(given)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    out = tmp_path / "out.gguf"
    done = CliRunner().invoke(app, ["export", str(run), str(out), "--gguf", "f16", "--push-to-hub", "us/it"])
    assert done.exit_code == 0, done.output
    assert calls == ["us/it", {"path_or_fileobj": out, "path_in_repo": "out.gguf", "repo_id": "us/it"}]
