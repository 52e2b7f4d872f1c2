"""text.py against the golden context, and against transformers' own hidden states of a random Gemma 3 made here."""

import copy
import math
import shutil
import weakref

import pytest
import torch
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


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_gemma(tmp_path / "nowhere", "cpu", torch.float32)


def test_checkpoint_without_text_projection(forge):
    path = forge(tensors={text.PROJECTION + "weight": None})
    with pytest.raises(UserError, match=r"video_aggregate_embed\.weight is missing"):
        TextConnector.from_checkpoint(path)
