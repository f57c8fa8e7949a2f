"""The command `python -m examples.lm`: arguments in, a report or one clear line for every error."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import ml_dtypes
import numpy as np

from examples.lm.capture import capture
from examples.lm.evaluate import TAU_ALONE, calibrate_layers, check_dense_rows, evaluate
from examples.lm.needle import ANSWER, CUE, DEPTHS, Needle, needle
from examples.lm.text import encode
from examples.lm.weights import Model, locate
from s2o_cupy import Settings, backends
from s2o_cupy.calibration import VARIANTS

PROG = "python -m examples.lm"
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DESCRIPTION = """\
A language model in NumPy whose attention is s2o_cupy (llama and gemma3 GGUF files; pip install 's2o-cupy[lm]').

  python -m examples.lm capture smollm2 --text FILE --length 4096 --layers 8,14 --out heads
  python -m examples.lm eval smollm2 --text FILE --length 4096 --error 0.02 --calibrate-text OTHER
  python -m examples.lm needle gemma3 --text FILE --length 8192 --error 0.1 --calibrate-text OTHER
"""


class _Parser(argparse.ArgumentParser):
    """Usage errors in one line, as all others are."""

    def error(self, message: str):
        self.exit(2, f"lm: error: {message} ({self.prog} --help shows what is)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 (it could not be done), 2 (wrong input) or 130 (interrupted)."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("lm: interrupted", file=sys.stderr)
        return 130
    except (TypeError, ValueError) as error:
        return _refuse(error, 2)
    except (OSError, ImportError, MemoryError, RuntimeError) as error:
        return _refuse(error, 1)
    return 0


def run_capture(options) -> None:
    """Queries, keys and values of chosen layers to PREFIX_lNN.npz."""
    model = Model(locate(options.model))
    ids = encode(model, options.text, options.length)
    paths = capture(model, ids, options.layers, options.out, os.path.basename(options.text))
    if options.json:
        print(json.dumps({"model": model.name, "tokens": len(ids), "files": [str(path) for path in paths]}))
        return
    for path in paths:
        print(path)


def run_eval(options) -> None:
    """Losses, densities and times, dense and sparse."""
    xp = _arrays(options.device)
    model = Model(locate(options.model), xp, _dtype(options))
    ids = xp.asarray(encode(model, options.text, options.length))
    settings, report = _calibrated(options, model, ids)
    report |= evaluate(model, ids, settings, options.repeats, options.dense_rows)
    print(json.dumps(report, indent=1) if options.json else _table(report))


def run_needle(options) -> None:
    """The probability of a planted fact, dense and sparse."""
    xp = _arrays(options.device)
    model = Model(locate(options.model), xp, _dtype(options))
    ids = encode(model, options.text, options.length)
    planted = Needle.make(model, ids, options.cue, options.answer)
    settings, report = _calibrated(options, model, xp.asarray(ids))
    report |= {"cue": options.cue, "answer": options.answer}
    report |= needle(model, planted, settings, options.depths, options.dense_rows, xp)
    print(json.dumps(report, indent=1) if options.json else _needle_table(report))


def _arrays(device: str):
    """The array module of a device."""
    if device == "cpu":
        return np
    backends.require("cuda")
    import cupy

    return cupy


def _dtype(options):
    """What attention takes: on a GPU float16 by default, which its tensor cores read."""
    return _DTYPES[options.dtype or ("float32" if options.device == "cpu" else "float16")]


def _calibrated(options, model: Model, ids) -> tuple[dict, dict]:
    """Settings of the global layers, and the report's first lines."""
    check_dense_rows(options.dense_rows, len(ids))
    seen = ids
    if options.calibrate_text is not None:
        seen = _arrays(options.device).asarray(encode(model, options.calibrate_text, options.length))
    if not options.dense_from > 0:
        raise ValueError(f"dense-from is {options.dense_from:g}; allowed: a number above 0")
    if np.isfinite(options.dense_from) and not options.per_head:
        raise ValueError("dense-from needs per-head: without it a layer's heads have one tau")
    start = time.perf_counter()
    base = Settings.precise() if options.precise else Settings()
    base = base.replace(**dict(options.set))
    variants = VARIANTS if options.all_variants else TAU_ALONE
    choices = (options.per_head, options.dense_from, dict(options.layer_error))
    settings = calibrate_layers(model, seen, options.error, variants, base, *choices)
    return settings, {
        "model": model.name,
        "device": options.device,
        "attention_dtype": model.dtype.name,
        "text": os.path.basename(options.text),
        "calibrated_on": os.path.basename(options.calibrate_text or options.text),
        "settings": "precise" if options.precise else "default",
        "changed": dict(options.set),
        "tau_per_head": options.per_head,
        "dense_from": options.dense_from if np.isfinite(options.dense_from) else None,
        "error": options.error,
        "error_of_layer": {str(layer): error for layer, error in options.layer_error},
        "calibration_s": time.perf_counter() - start,
    }


def _table(r: dict) -> str:
    """The report for people."""
    lines = [
        *_heading(r),
        f"{'':24} {'dense':>9} {'sparse':>9}",
        f"{'nats a token':24} {r['dense_nats']:9.4f} {r['sparse_nats']:9.4f}   {r['rise_nats']:+.4f}",
    ]
    for i, pair in enumerate(zip(*r["nats_by_position"].values())):
        label = f"  quarter {i + 1} of the text"
        lines.append(f"{label:24} {pair[0]:9.4f} {pair[1]:9.4f}   {pair[1] - pair[0]:+.4f}")
    for label, key in (("prefill, s", "prefill_s"), ("global attention, s", "global_attention_s")):
        a, b = r[key]["dense"], r[key]["sparse"]
        lines.append(f"{label:24} {a:9.2f} {b:9.2f}   {a / b:.2f} times as fast")
    lines += [
        f"greatest logit change    {r['greatest_logit_change']:.4g}",
        f"top-1 agreement          {r['top1_agreement']:.4f}",
        f"mean density             {r['mean_density']:.4f} (global layers)" if r["density"] else "no global layer",
        f"calibration              {r['calibration_s']:.0f} s",
    ]
    if r["path"] == "dense":
        lines.append("attention was dense by itself: the text is too short for ranking to pay")
    if r["density"]:
        lines.append(f"{'layer':>5} {'least tau':>9} {'density':>8}  least to greatest of its heads")
    for layer, heads in r["density"].items():
        mean = sum(heads) / len(heads)
        tau = min(np.atleast_1d(r["tau"][layer]))
        lines.append(f"{layer:>5} {tau:9.2g} {mean:8.3f}  {min(heads):.3f} to {max(heads):.3f}")
    return "\n".join(lines)


def _needle_table(r: dict) -> str:
    """The needle's report for people."""
    lines = [
        *_heading(r),
        f"{r['cue']!r} then {r['answer']!r}, {r['answer_tokens']} tokens",
        "  depth     dense    sparse",
    ]
    for depth, *pair in zip(r["depth"], *r["probability"].values()):
        lines.append(f"{depth:7.2f} {pair[0]:9.4f} {pair[1]:9.4f}")
    lines.append(f"  found {r['times_found']['dense']:9d} {r['times_found']['sparse']:9d}   of {len(r['depth'])}")
    lines.append(f"mean density {r['mean_density']:.4f} (global layers)" if r["mean_density"] else "no global layer")
    return "\n".join(lines)


def _heading(r: dict) -> list[str]:
    same = "" if r["calibrated_on"] != r["text"] else " (the text itself: no held-out result)"
    tau = "a tau a head" if r["tau_per_head"] else "a tau a layer"
    changed = "".join(f"{name} {value}, " for name, value in r["changed"].items())
    rows = f"; the last {r['dense_rows']} rows dense" if r["dense_rows"] else ""
    of_layer = "".join(f" ({error:g} in layer {layer})" for layer, error in r["error_of_layer"].items())
    return [
        f"{r['model']}, {r['text']}, {r['tokens']} tokens, {r['device']}, attention in {r['attention_dtype']}",
        f"{r['settings']} settings, {changed}{tau}, error {r['error']:g}{of_layer} calibrated on "
        f"{r['calibrated_on']}{same}{rows}",
    ]


def _refuse(error: Exception, code: int) -> int:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    print(f"lm: error: {' '.join(text.split())}", file=sys.stderr)
    return code


def _layers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers, as in 8,14") from None


def _layer_error(text: str) -> tuple[int, float]:
    layer, _, error = text.partition("=")
    try:
        return int(layer), float(error)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no error of a layer, as in 11=0.05") from None


def _setting(text: str) -> tuple:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting, as in segment=512, share_order=true or tail=spread")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()  # a word, which the settings know or refuse


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(PROG, description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", metavar="MODEL", help="a GGUF file, or smollm2 or gemma3 for the installed package")
    common.add_argument("--text", required=True, metavar="FILE", help="text to read, UTF-8")
    common.add_argument("--length", type=int, metavar="N", help="its first N tokens (default: all)")
    common.add_argument("--json", action="store_true", help="print JSON in place of the table")
    sub = commands.add_parser("capture", parents=[common], help="q, k, v of chosen layers, for s2o run")
    sub.add_argument("--layers", type=_layers, required=True, metavar="L,L", help="layers, from 0")
    sub.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX_lNN.npz for each layer")
    sub.set_defaults(run=run_capture)
    sparse = argparse.ArgumentParser(add_help=False)
    sparse.add_argument("--error", type=float, required=True, metavar="E", help="relative error of a head accepted")
    sparse.add_argument(
        "--layer-error",
        type=_layer_error,
        action="append",
        default=[],
        metavar="LAYER=E",
        help="another one for a global layer, as in 11=0.05 (may be repeated)",
    )
    sparse.add_argument("--calibrate-text", metavar="FILE", help="text that settings are found on (default: the same)")
    sparse.add_argument("--precise", action="store_true", help="Settings.precise() in place of the defaults")
    sparse.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one of them changed, in JSON: segment=512, share_order=true (may be repeated)",
    )
    sparse.add_argument(
        "--per-head", action="store_true", help="a tau for each head, so that each comes near the error"
    )
    sparse.add_argument(
        "--dense-from",
        type=float,
        default=np.inf,
        metavar="D",
        help="with --per-head: heads that would walk a share D of their pairs or more are dense",
    )
    sparse.add_argument(
        "--dense-rows", type=int, default=0, metavar="R", help="rows at the end that stay dense (default 0)"
    )
    sparse.add_argument("--all-variants", action="store_true", help="calibrate tries other rankings too, not tau alone")
    sparse.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="NumPy, or CuPy on the current GPU")
    sparse.add_argument("--dtype", choices=_DTYPES, help="attention's (default: float32, on a GPU float16)")
    sub = commands.add_parser("needle", parents=[common, sparse], help="a planted fact's probability, dense and sparse")
    sub.add_argument(
        "--depths", type=_count, default=DEPTHS, metavar="K", help="places of the fact (default %(default)s)"
    )
    sub.add_argument("--cue", default=CUE, help="start of the fact, and the prompt's end (default: %(default)s)")
    sub.add_argument("--answer", default=ANSWER, help="what follows it (default: %(default)r)")
    sub.set_defaults(run=run_needle)
    sub = commands.add_parser("eval", parents=[common, sparse], help="next-token loss, dense and sparse")
    sub.add_argument("--repeats", type=_count, default=1, metavar="R", help="passes of each kind, in turn; least time")
    sub.set_defaults(run=run_eval)
    return parser


if __name__ == "__main__":
    sys.exit(main())
