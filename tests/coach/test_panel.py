"""Several adapters on one base: each row as if its adapter were alone."""

import hashlib
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from networks import write_network

from interviewmate_mlx.adapter.config import AdapterConfig
from interviewmate_mlx.adapter.folder import WEIGHTS_FILE, adapter_weights, save_adapter
from interviewmate_mlx.base.base import Base
from interviewmate_mlx.coach.generate import answer, load_coach
from interviewmate_mlx.coach.panel import Panel
from interviewmate_mlx.coach.sampling import Sampling
from interviewmate_mlx.data.prompts import encode_question
from interviewmate_mlx.data.records import Message
from interviewmate_mlx.data.templates import VERBATIM
from interviewmate_mlx.errors import AdapterError, ConfigError
from interviewmate_mlx.model.lora import add_lora
from interviewmate_mlx.model.switched_lora import RowUpdates, SwitchedLoRALinear

QUESTIONS = ["What is a loss?", "What is a validation set?", "What is the gradient?"]


@pytest.fixture(scope="module")
def folders(tiny_adapter, random_adapter):
    return {"learned": tiny_adapter, "random": random_adapter}


@pytest.fixture(scope="module")
def panel(tiny_base, folders):
    return Panel.load(tiny_base, folders)


def test_voices_are_the_base_and_each_adapter(panel, tiny_base, folders):
    assert list(panel.voices) == [tiny_base.name, "learned", "random"]
    assert [voice.number for voice in panel.voices.values()] == [0, 1, 2]
    assert panel.base.adapter_hash == ""
    weights = (folders["learned"] / WEIGHTS_FILE).read_bytes()
    assert panel.voice("learned").adapter_hash == hashlib.sha256(weights).hexdigest()
    assert panel.context == 2048
    with pytest.raises(ConfigError, match="No adapter 'other' here, expected one of: tiny, learn"):
        panel.voice("other")


def test_rows_of_a_batch_have_the_logits_of_their_own_adapter(panel, tiny_base, folders):
    """In float32. A row's numbers differ by how the products are batched: some roundings."""
    ids = mx.array([encode_question(panel.tokenizer, QUESTIONS[0])] * 3)
    order = [2, 0, 1]
    caches = [panel.model.make_cache(number) for number in order]
    joined = [each[0].merge(list(each)) for each in zip(*caches, strict=True)]
    together = np.array(panel.model(ids, joined))
    for row, number in enumerate(order):
        alone, _ = load_coach(tiny_base, [None, *folders.values()][number])
        expected = np.array(alone(ids[:1]))[0]
        np.testing.assert_allclose(together[row], expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(together[0] - together[1]).max() > 0.1  # the adapters do something
    assert np.abs(together[2] - together[1]).max() > 0.1


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_rows_of_other_networks_have_their_own_adapters_too(model_type, tmp_path):
    """Also with the rotating caches of a sliding window, which is shorter than the prompt."""
    base = tmp_path / "base"
    write_network(base, model_type)
    model = Base.open(base).load(mx.float32)
    targets = tuple(model.attention_targets)
    add_lora(model, targets, 4, 16)
    mx.random.seed(1)
    weights = {n: 0.2 * mx.random.normal(a.shape) for n, a in adapter_weights(model).items()}
    config = AdapterConfig(str(base), 4, 16.0, targets=targets)
    save_adapter(tmp_path / "changed", weights, config)
    panel = Panel.load(base, {"changed": tmp_path / "changed"})
    ids = mx.array([encode_question(panel.tokenizer, QUESTIONS[0])] * 2)
    assert ids.shape[1] > 8
    caches = [panel.model.make_cache(number) for number in (1, 0)]
    joined = [each[0].merge(list(each)) for each in zip(*caches, strict=True)]
    rows = [np.array(panel.model(ids, joined)), np.array(panel.model(ids[:, :1], joined))]
    longer = mx.concatenate([ids, ids[:, :1]], axis=1)
    for row, adapter in enumerate((tmp_path / "changed", None)):
        alone, _ = load_coach(base, adapter)
        expected = np.array(alone(longer[:1]))[0]
        together = np.concatenate([rows[0][row], rows[1][row]])
        np.testing.assert_allclose(together, expected, atol=1e-4 * np.abs(expected).max())


def test_greedy_text_is_the_same_alone_and_in_company(panel, tiny_base, folders):
    expected = {}
    for number, folder in enumerate([None, *folders.values()]):
        model, tokenizer = load_coach(tiny_base, folder)
        for question in QUESTIONS:
            expected[number, question] = answer(model, tokenizer, question, Sampling(24))
    assert len(set(expected.values())) > 6
    generator = BatchGenerator(
        panel.model, stop_tokens=[[token] for token in panel.tokenizer.eos_token_ids]
    )
    wanted = list(expected)
    # Not all at once: rows come and go while others are under way.
    said: dict[int, list[int]] = {}
    numbers: dict[int, tuple[int, str]] = {}
    for start in range(0, len(wanted), 4):
        part = wanted[start : start + 4]
        uids = generator.insert(
            [encode_question(panel.tokenizer, question) for _, question in part],
            max_tokens=[24] * len(part),
            caches=[panel.model.make_cache(number) for number, _ in part],
        )
        numbers |= dict(zip(uids, part, strict=True))
        for _ in range(5):
            collect(generator.next_generated(), said)
    while responses := generator.next_generated():
        collect(responses, said)
    generator.close()
    got = {numbers[uid]: panel.tokenizer.decode(tokens).strip() for uid, tokens in said.items()}
    assert got == expected


def collect(responses, said):
    for response in responses:
        if response.finish_reason != "stop":
            said.setdefault(response.uid, []).append(response.token)


def test_ranks_and_targets_may_differ(panel):
    layers = [m for _, m in panel.model.named_modules() if isinstance(m, SwitchedLoRALinear)]
    assert {layer.A.shape[1] for layer in layers} == {8}
    assert {layer.A.shape[0] for layer in layers} == {2, 3}  # the random one has fewer targets


def test_one_set_of_weights_whatever_the_number_of_adapters(tiny_base, folders):
    network = Base.open(tiny_base).load(mx.float32)
    shared = Panel.load(tiny_base, {f"{n}": folders["random"] for n in range(5)}).model
    plain = sum(v.size for v in flat(network).values())
    assert sum(v.size for v in flat(shared).values()) < 1.5 * plain


def flat(module):
    return dict(tree_flatten(module.parameters()))


def test_row_updates_do_what_a_batch_does_with_caches():
    rows = RowUpdates.merge([RowUpdates([1]), RowUpdates([0]), RowUpdates([2])])
    rows.extend(RowUpdates([3]))
    assert rows.numbers == [1, 0, 2, 3]
    rows.filter([3, 0])
    assert rows.numbers == [3, 1]
    assert rows.extract(1).numbers == [1]
    rows.prepare(lengths=[1], right_padding=[0])
    rows.finalize()
    assert (rows.numbers, rows.nbytes, rows.state) == ([3, 1], 0, ())


def test_base_makes_way_for_an_adapter_of_its_name(tiny_base, folders):
    panel = Panel.load(tiny_base, {"tiny": folders["random"]})
    assert [(voice.name, voice.number) for voice in panel.voices.values()] == [
        ("tiny-base", 0),
        ("tiny", 1),
    ]
    with pytest.raises(ConfigError, match="An adapter is named 'tiny-base', as the base is"):
        Panel.load(tiny_base, {"tiny": folders["random"], "tiny-base": folders["random"]})


def test_no_base_and_no_adapter_is_refused():
    with pytest.raises(ConfigError, match="No base: name one"):
        Panel.load(None, {})


def test_adapter_that_does_not_fit_is_refused(tiny_base, folders, tmp_path):
    bad = shutil.copytree(folders["random"], tmp_path / "bad")
    config = bad / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(AdapterError, match="does not fit this model"):
        Panel.load(tiny_base, {"good": folders["learned"], "bad": bad})


def test_voice_of_verbatim_texts_takes_one_message(panel):
    voice = replace(panel.voice("learned"), template=VERBATIM)
    one = [Message("user", "A mean is")]
    assert voice.prompt(panel.tokenizer, one) == list(
        panel.tokenizer.encode("A mean is", add_special_tokens=False)
    )
    with pytest.raises(ConfigError, match="trained on verbatim texts, which have no turns"):
        voice.prompt(panel.tokenizer, [*one, Message("assistant", "x"), Message("user", "y")])
