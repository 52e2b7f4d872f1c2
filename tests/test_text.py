"""text.py against the golden context, and against transformers' own hidden states of a random Gemma 3 made here."""

import copy
import json
import math
import os
import shutil
import warnings
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import text
from common.errors import UserError
from text import TextConnector, TextEncoder, load_gemma, pad_features

HIDDEN, LAYERS, SLOTS = 24, 3, 48  # what tiny_a's projection takes; SLOTS is the tokenizer's own maximum
PROMPTS = ["A young woman smiles.", "An old man with a grey beard looks up, then nods.", "blue wall", ""]
LONG = " ".join(PROMPTS) * 20


def text_config(**changes):
    from transformers import Gemma3TextConfig

    sizes = {
        "vocab_size": 800,  # more than the tokenizer of assets/gemma has
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
        "max_position_embeddings": 128,
        "layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
    }
    return Gemma3TextConfig(**(sizes | changes))


def save(model, folder, root):
    """Random weights, norms included, and the tiny tokenizer, with <bos> as Gemma's: a folder such as the hub's."""
    from transformers import AutoTokenizer

    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(root / "assets" / "gemma", add_bos_token=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(root, tmp_path_factory):
    from transformers import Gemma3TextModel

    return save(Gemma3TextModel(text_config()), tmp_path_factory.mktemp("gemma"), root)


@pytest.fixture(scope="module")
def gemma_with_vision(root, tmp_path_factory):
    """The layout of the released Gemma: language model under a prefix, beside a vision tower."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text_config().to_dict(), vision_config=vision, mm_tokens_per_image=4)
    return save(Gemma3ForConditionalGeneration(config), tmp_path_factory.mktemp("gemma_with_vision"), root)


@pytest.fixture(scope="module")
def gemma_causal(root, tmp_path_factory):
    from transformers import Gemma3ForCausalLM

    return save(Gemma3ForCausalLM(text_config()), tmp_path_factory.mktemp("gemma_causal"), root)


@pytest.fixture(scope="module")
def encoder(tiny_a, gemma):
    return TextEncoder.from_checkpoint(tiny_a, gemma)


def hidden_states(folder, prompts):
    """All hidden states by transformers, padded on the left to the full length: (B, S, hidden, layers), mask (B, S)."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model = getattr(model, "language_model", model).eval()
    batch = tokenizer(
        [prompt.strip() for prompt in prompts],
        padding="max_length",
        padding_side="left",
        truncation=True,
        max_length=SLOTS,
        return_tensors="pt",
    )
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    return torch.stack(states, dim=-1), batch["attention_mask"]


def project_by_the_facts(path, hidden, mask):
    """Normalize each token and layer, flatten with the layer fastest, zero the padding, scale, one linear layer."""
    tensors = load_file(path)
    weight = tensors["text_embedding_projection.video_aggregate_embed.weight"].double()
    bias = tensors["text_embedding_projection.video_aggregate_embed.bias"].double()
    x = hidden.double()
    x = x / torch.sqrt((x**2).mean(dim=2, keepdim=True) + 1e-6)
    x = x.flatten(2) * mask[..., None] * math.sqrt(weight.shape[0] / hidden.shape[2])
    return (x @ weight.T + bias).float()


# ---------------------------------------------------------------------------------------------------------------------
# the checkpoint's share


def test_context_equals_golden(connector, golden):
    context = connector(golden["gemma_hidden"], golden["gemma_mask"])
    torch.testing.assert_close(context, golden["text_context"], atol=1e-4, rtol=0)


def test_projection_equals_the_facts(connector, golden, tiny_a):
    want = project_by_the_facts(tiny_a, golden["gemma_hidden"], golden["gemma_mask"])
    tokens = golden["gemma_mask"].bool()
    got = connector.project(golden["gemma_hidden"])
    torch.testing.assert_close(got[tokens], want[tokens], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_connector_takes_tokens_from_any_slots_and_ignores_the_rest(connector, seed):
    """Left or right padding, holes, whatever stands in the padded slots: only the tokens in their order count."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 20, 128, generator=generator)
    mask = torch.rand(1, 20, generator=generator) < 0.5
    count = int(mask.sum())
    front = torch.zeros(1, 20, 128)
    front[0, :count] = features[0, mask[0]]
    want = connector.connector(front, torch.arange(20)[None] < count)
    features[0, ~mask[0]] = float("nan")
    torch.testing.assert_close(connector.connector(features, mask), want, atol=1e-5, rtol=0)


def test_free_slots_take_the_register_of_their_own_place(connector, monkeypatch):
    """Facts: slot j takes register j mod their number, counted from slot 0 and not from the first free one."""
    inner = connector.connector
    monkeypatch.setitem(inner._modules, "transformer_1d_blocks", torch.nn.ModuleList())
    features, mask = torch.randn(1, 30, 128, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 30).bool()
    mask[0, -3:] = True
    seen = inner(features, mask)[0]
    registers = inner.learnable_registers
    for slot in range(30):
        x = features[0, 27 + slot] if slot < 3 else registers[slot % len(registers)]
        torch.testing.assert_close(seen[slot], x / (x.square().mean() + 1e-6).sqrt(), atol=1e-5, rtol=0)


def test_pad_features():
    rows = [torch.ones(2, 3), torch.ones(5, 3), torch.ones(1, 3)]
    padded, mask = pad_features(rows, 6)
    assert padded.shape == (3, 6, 3) and mask.sum(dim=1).tolist() == [2, 5, 1]
    assert torch.equal(padded.any(dim=2), mask) and torch.equal(mask, mask.sort(dim=1, descending=True).values)


# ---------------------------------------------------------------------------------------------------------------------
# with Gemma, against transformers


@pytest.mark.parametrize("kind", ["gemma", "gemma_with_vision", "gemma_causal"])
def test_encode_equals_transformers_and_the_facts(kind, request, tiny_a, connector):
    folder = request.getfixturevalue(kind)
    prompts = [*PROMPTS, LONG]
    hidden, mask = hidden_states(folder, prompts)
    assert mask.sum(dim=1).min() == 1 and mask.sum(dim=1).max() == SLOTS
    features = project_by_the_facts(tiny_a, hidden, mask)
    encoder = TextEncoder.from_checkpoint(tiny_a, folder)
    for got, want, tokens in zip(encoder.features(prompts), features, mask.bool()):
        torch.testing.assert_close(got, want[tokens], atol=1e-4, rtol=0)
    context = encoder.encode(prompts)
    assert context.shape == (len(prompts), SLOTS, 128)
    torch.testing.assert_close(context, connector(hidden, mask), atol=1e-4, rtol=0)
    torch.testing.assert_close(context, connector.connector(features, mask.bool()), atol=1e-4, rtol=0)


def test_only_the_language_model_is_kept(gemma_with_vision):
    _, model = load_gemma(gemma_with_vision, "cpu", torch.float32)
    assert type(model).__name__ == "Gemma3TextModel"
    assert not any("vision" in name for name, _ in model.named_modules())
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_a_prompt_does_not_depend_on_its_batch(encoder):
    together = encoder.encode([*PROMPTS, LONG])
    for prompt, context in zip([*PROMPTS, LONG], together):
        torch.testing.assert_close(encoder.encode([prompt])[0], context, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_spaces_around_a_prompt_do_not_count(encoder):
    assert torch.equal(encoder.encode(["  \n A man.\t "]), encoder.encode(["A man."]))
    assert torch.equal(encoder.encode([" \n"]), encoder.encode([""]))
    assert not torch.equal(encoder.encode(["A  man."]), encoder.encode(["A man."]))  # inside they do


def test_empty_prompt_is_bos_alone_and_a_long_one_keeps_it(encoder):
    """Gemma is causal, so what it makes of <bos> is the same in front of any prompt."""
    empty, full = encoder.features(["", LONG])
    assert len(empty) == 1 and len(full) == SLOTS == encoder.max_tokens
    torch.testing.assert_close(full[:1], empty, atol=1e-4, rtol=0)


def test_embedded_tokenizer_leads_with_bos(root):
    """Without it the empty prompt has no token at all, and a batch of empty prompts nothing to run Gemma on."""
    embedded = TextEncoder.from_checkpoint(root / "assets" / "tiny.safetensors", root / "assets" / "gemma")
    bos = embedded.tokenizer.bos_token_id
    assert bos is not None and embedded.tokenizer("A man.")["input_ids"][0] == bos
    assert embedded.tokenizer("")["input_ids"] == [bos]
    assert embedded.encode([""]).isfinite().all()


def test_tokenizer_without_bos_is_refused(root, gemma, tmp_path, tiny_a):
    """Facts: a leading <bos>. A tokenizer that leaves it out would shift what every prompt means, silently."""
    from transformers import AutoTokenizer

    shutil.copytree(gemma, tmp_path, dirs_exist_ok=True)
    AutoTokenizer.from_pretrained(root / "assets" / "gemma", add_bos_token=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bos"):
        TextEncoder.from_checkpoint(tiny_a, tmp_path)


def test_a_tokenizer_without_a_limit_gives_the_models_1024_slots(encoder, connector):
    tokenizer = copy.copy(encoder.tokenizer)
    tokenizer.model_max_length = int(1e30)  # as the released one says
    assert TextEncoder(tokenizer, encoder.gemma, connector).max_tokens == 1024


def test_no_stack_of_all_hidden_states_is_held(encoder, monkeypatch):
    """49 states of 1024 x 3840 in float32 are 0.8 GB per prompt; each must go before the next but one comes."""
    seen, alive = [], []
    plain = TextConnector.project_layer

    def watched(self, x, layer):
        seen.append(weakref.ref(x))
        alive.append(sum(ref() is not None for ref in seen))
        return plain(self, x, layer)

    monkeypatch.setattr(TextConnector, "project_layer", watched)
    encoder.features(["A man."])
    assert len(seen) == LAYERS + 1 and max(alive) <= 2, alive


def test_features_leave_no_hooks_behind(encoder):
    encoder.features(["A man."])
    modules = [*encoder.gemma.layers, encoder.gemma.norm]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_bfloat16_is_near_float32(tiny_a, gemma, encoder):
    half = TextEncoder.from_checkpoint(tiny_a, gemma, dtype=torch.bfloat16)
    assert next(half.gemma.parameters()).dtype == torch.bfloat16
    context, want = half.encode(PROMPTS), encoder.encode(PROMPTS)
    assert context.dtype == torch.bfloat16
    assert (context.float() - want).abs().mean() < 0.1 * want.abs().mean()


# ---------------------------------------------------------------------------------------------------------------------
# what a user hears about a prompt


@pytest.mark.parametrize("limit", [48, 1024])
@pytest.mark.parametrize("count", [0, 1, 46, 47, 48, 1023, 1024, 4999])
def test_a_prompt_beyond_the_limit(encoder, connector, limit, count):
    """Each of these words is one token, and <bos> is one more, so the truth is arithmetic."""
    tokenizer = copy.copy(encoder.tokenizer)
    tokenizer.model_max_length = 48 if limit == 48 else int(1e30)
    limited = TextEncoder(tokenizer, encoder.gemma, connector)
    words = [("walks", "nods", "wall", "blue", "front", "the", "left")[k * k % 7] for k in range(count)]
    assert len(tokenizer(" ".join(words))["input_ids"]) == count + 1
    kept = words[: limit - 1]
    want = None if count + 1 <= limit else (count + 1 - limit, " ".join(kept[-5:]))
    assert limited.cut(f"  {' '.join(words)}\n") == want
    if want and limit == 48:  # and Gemma reads just the kept words
        assert torch.equal(limited.features([" ".join(words)])[0], limited.features([" ".join(kept)])[0])


@pytest.mark.parametrize(
    "prompt, unknown",
    [
        ("A person walks by to the left in front of a teal wall.", []),
        ("Someone nods, then walks by: blue-teal!", []),
        ("", []),
        ("A young woman in a red coat turns to the camera.", ["young", "woman", "coat"]),
        ("woman, coat; a woman's coat", ["woman", "coat"]),
        ("Une femme devant un mur bleu", ["Une", "femme", "devant", "un", "mur", "bleu"]),
        ("一个女人", ["一个女人"]),
        ("a naïve person", ["naïve"]),
    ],
)
def test_unknown_words_of_the_tiny_tokenizer(root, encoder, connector, prompt, unknown):
    assert set(encoder.unknown_words(prompt)) == set(unknown)
    assert encoder.unknown_words(prompt) == sorted(encoder.unknown_words(prompt), key=prompt.index)


def test_words_beyond_the_cut_are_not_looked_up(encoder):
    """They cost nothing: a prompt of a megabyte took minutes."""
    prompt = "unseen " + "person " * 30_000 + "beyond"
    assert encoder.cut(prompt) and "unseen" in encoder.unknown_words(prompt)
    assert "beyond" not in encoder.unknown_words(prompt) and "beyond" in encoder.unknown_words("beyond")


def test_a_tokenizer_with_bytes_knows_every_word(encoder, connector):
    from transformers import GemmaTokenizer

    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=48, add_bos_token=True)
    assert len(tokenizer("femme 女")["input_ids"]) == 1 + 5 + 1 + 3  # <bos>, and a token for each byte
    assert TextEncoder(tokenizer, encoder.gemma, connector).unknown_words("Une femme 女 coat") == []


def test_nothing_is_printed(gemma, tiny_a, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = TextEncoder.from_checkpoint(tiny_a, gemma)
        encoder.encode([LONG, ""])
        encoder.cut(LONG)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# what can be wrong with it


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 32}, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}]
)
def test_gemma_of_another_size(tiny_a, root, tmp_path, changes):
    from transformers import Gemma3TextModel

    config = text_config(**changes)
    save(Gemma3TextModel(config), tmp_path, root)
    with pytest.raises(UserError, match=f"{config.num_hidden_layers} layers of width {config.hidden_size}.*3 of 24"):
        TextEncoder.from_checkpoint(tiny_a, tmp_path)


def test_hub_name_that_cannot_be_had_names_page_and_command(tiny_a):
    with pytest.raises(UserError, match=f"https://huggingface.co/{text.GEMMA}.*hf auth login.*hf download"):
        TextEncoder.from_checkpoint(tiny_a, text.GEMMA)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_tensor(path):
    tensors = load_file(path)
    tensors.pop("layers.1.mlp.down_proj.weight")
    save_file(tensors, path, {"format": "pt"})


BROKEN = {
    "no config": ("config.json", lambda path: path.unlink()),
    "damaged config": ("config.json", cut),
    "another kind of model": ("config.json", lambda path: path.write_text('{"model_type": "unheard_of"}')),
    "no weights": ("model.safetensors", lambda path: path.unlink()),
    "truncated weights": ("model.safetensors", cut),
    "empty weights": ("model.safetensors", lambda path: path.write_bytes(b"")),
    "a tensor missing": ("model.safetensors", drop_tensor),
    "damaged tokenizer": ("tokenizer.json", cut),
    "no tokenizer": ("tokenizer.json", lambda path: [file.unlink() for file in path.parent.glob("tokenizer*")]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_gemma_folder_is_a_user_error(tiny_a, gemma, tmp_path, what):
    """transformers fills a missing tensor with random numbers, and a missing tokenizer with one of no words."""
    folder = tmp_path / "gemma"
    shutil.copytree(gemma, folder)
    file, break_it = BROKEN[what]
    break_it(folder / file)
    with pytest.raises(UserError, match="tokenizer" if what == "no tokenizer" else str(folder)):
        TextEncoder.from_checkpoint(tiny_a, folder)


CONFIGS = ("config.json", "tokenizer_config.json", "tokenizer.json")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "file, fields",
    [
        ("config.json", {"num_hidden_layers": 0}),
        ("config.json", {"num_hidden_layers": True}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"hidden_size": "24"}),
        ("config.json", {"vocab_size": 10**12}),
        ("config.json", {"intermediate_size": 10**12}),
        ("config.json", {"layer_types": ["full_attention"]}),
        ("config.json", {"rms_norm_eps": math.nan}),
        ("config.json", {"query_pre_attn_scalar": -1}),  # this one and the next show only when a prompt is read
        ("config.json", {"sliding_window": None}),
        ("config.json", {"hidden_activation": "unheard of"}),
        ("config.json", {"model_type": "llama"}),
        ("tokenizer_config.json", {"model_max_length": -1}),
        ("tokenizer_config.json", {"model_max_length": 0}),
        ("tokenizer_config.json", {"model_max_length": "48"}),
        ("tokenizer_config.json", {"pad_token": None}),
        ("tokenizer_config.json", {"model_input_names": [1]}),
        ("tokenizer.json", {"model": {"type": "BPE"}}),
        ("tokenizer.json", {"added_tokens": 3}),
    ],
)
def test_a_wrong_value_is_a_user_error(tiny_a, gemma, tmp_path, file, fields):
    folder = shutil.copytree(gemma, tmp_path / "gemma")
    change(folder / file, **fields)
    with pytest.raises(UserError, match=str(folder)) as caught:
        TextEncoder.from_checkpoint(tiny_a, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", CONFIGS)
@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"\x00\xff\xfe", b"[" * 100_000, b'{"a":' * 5000, '{"a": 1}'.encode("utf-16")]
)
def test_a_file_of_garbage_is_a_user_error(tiny_a, gemma, tmp_path, file, data):
    folder = shutil.copytree(gemma, tmp_path / "gemma")
    (folder / file).write_bytes(data)
    with pytest.raises(UserError, match=str(folder)):
        TextEncoder.from_checkpoint(tiny_a, folder)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_loads_or_is_a_user_error(tiny_a, gemma, tmp_path_factory, data):
    """One value somewhere in one of Gemma's three JSON files is replaced by any other."""
    folder = tmp_path_factory.mktemp("any") / "gemma"
    shutil.copytree(gemma, folder)
    path = folder / data.draw(st.sampled_from(CONFIGS))
    value = whole = {"": json.loads(path.read_text())}
    key = ""
    while isinstance(value[key], dict | list) and value[key] and (value is whole or data.draw(st.booleans())):
        value = value[key]
        key = data.draw(st.sampled_from(sorted(value)) if isinstance(value, dict) else st.integers(0, len(value) - 1))
    numbers = st.integers(-(2**70), 2**70) | st.floats()
    plain = st.none() | st.booleans() | numbers | st.text(max_size=5)
    value[key] = data.draw(st.recursive(plain, lambda some: st.lists(some) | st.dictionaries(st.text(), some)))
    path.write_text(json.dumps(whole[""]))
    try:
        encoder = TextEncoder.from_checkpoint(tiny_a, folder)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert encoder.encode([LONG, ""]).isfinite().all()
    encoder.cut(LONG), encoder.unknown_words(LONG)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.mlp.down_proj.weight", "norm.weight"])
def test_weights_that_are_not_numbers_are_named(tiny_a, gemma, tmp_path, name, value):
    folder = shutil.copytree(gemma, tmp_path / "gemma")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{folder} has NaN or infinity in {name}"):
        TextEncoder.from_checkpoint(tiny_a, folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_not_plain_floats_are_named(tiny_a, gemma, tmp_path, dtype):
    """transformers would cast them to float without a word."""
    folder = shutil.copytree(gemma, tmp_path / "gemma")
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors stores norm\.weight as"):
        TextEncoder.from_checkpoint(tiny_a, folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_does_not_run(tiny_a, gemma, encoder, tmp_path, monkeypatch, file):
    """And nobody is asked whether it may: input() would hang where there is no terminal."""
    folder, ran = shutil.copytree(gemma, tmp_path / "gemma"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    names = {"config.json": ["AutoConfig", "AutoModel"], "tokenizer_config.json": ["AutoTokenizer"]}[file]
    change(folder / file, auto_map={name: "evil.C" if name != "AutoTokenizer" else ["evil.C", None] for name in names})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    got = TextEncoder.from_checkpoint(tiny_a, folder).encode(PROMPTS)
    assert torch.equal(got, encoder.encode(PROMPTS)) and not ran.exists()
    (folder / "tokenizer.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        TextEncoder.from_checkpoint(tiny_a, folder)
    assert not ran.exists()


def test_only_safetensors_are_read(tiny_a, gemma, tmp_path):
    folder = shutil.copytree(gemma, tmp_path / "gemma")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=str(folder)):
        TextEncoder.from_checkpoint(tiny_a, folder)


def test_an_adapter_and_a_pipe_are_refused(tiny_a, gemma, tmp_path):
    folder = shutil.copytree(gemma, tmp_path / "gemma")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/something"}')
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        TextEncoder.from_checkpoint(tiny_a, folder)
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is a pipe"):
        TextEncoder.from_checkpoint(tiny_a, folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_gemma(tmp_path / "nowhere", "cpu", torch.float32)


def test_checkpoint_without_text_projection(forge):
    path = forge(tensors={text.PROJECTION + "weight": None})
    with pytest.raises(UserError, match=r"video_aggregate_embed\.weight is missing"):
        TextConnector.from_checkpoint(path)
