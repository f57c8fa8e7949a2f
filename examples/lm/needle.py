"""needle(): a fact planted in a long text, and the probability that the model repeats it at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

import s2o_cupy as s2o
from examples.lm.evaluate import Attention
from examples.lm.model import logits, prefill
from examples.lm.text import tokenizer
from examples.lm.weights import Model
from s2o_cupy.arrays import namespace
from s2o_cupy.progress import Bar

CUE, ANSWER = "The password of the lighthouse keeper is", " marmalade seventeen"
DEPTHS = 10


@dataclass(frozen=True)
class Needle:
    """A prompt's tokens: `text` with the fact (cue and answer) planted in it, and the cue alone at its end.

    Attributes
    ----------
    text : int array, the host's
    cue, fact, answer : int array
        Tokens of the question that ends the prompt; of the sentence planted; of the continuation that is right.
    """

    text: np.ndarray
    cue: np.ndarray
    fact: np.ndarray
    answer: np.ndarray

    @classmethod
    def make(cls, model: Model, text: np.ndarray, cue: str = CUE, answer: str = ANSWER) -> Needle:
        """A needle in the first of these tokens: prompts are as long as `text`, their answers included.

        Raises
        ------
        ValueError
            The answer is empty, or the text too short to plant the fact in.
        """
        tok = tokenizer(model)
        cue_ids, answer_ids, stop, start = (
            np.array(tok.encode(x, add_special_tokens=False).ids, np.int64) for x in (cue, answer, ".\n", "\n")
        )
        if not len(answer_ids):
            raise ValueError(f"answer is {answer!r}; allowed: a text of one token or more")
        fact = np.concatenate([start, cue_ids, answer_ids, stop])
        room = len(text) - len(fact) - len(start) - len(cue_ids) - len(answer_ids)
        if room < 2:
            raise ValueError(f"the text has {len(text)} tokens; wanted: {len(text) + 2 - room} or more for this needle")
        return cls(np.asarray(text)[:room], np.concatenate([start, cue_ids]), fact, answer_ids)

    def prompt(self, depth: float) -> np.ndarray:
        """The tokens with the fact at `depth`, from 0 (after the first token) to 1 (just before the question)."""
        place = 1 + round(depth * (len(self.text) - 1))
        return np.concatenate([self.text[:place], self.fact, self.text[place:], self.cue, self.answer])


def needle(
    model: Model, planted: Needle, settings: dict[int, s2o.Settings], depths: int = DEPTHS, dense_rows: int = 0, xp=np
) -> dict:
    """Probability of the right continuation, dense and sparse, with the fact at each of some depths.

    Parameters
    ----------
    model : Model
    planted : Needle
    settings : dict
        Settings of every global layer.
    depths : int
        Evenly from 0 to 1.
    dense_rows : int
        Rows at the prompt's end whose attention is dense in the sparse pass too.
    xp : module
        Of the model's arrays.

    Returns
    -------
    dict
        Of plain numbers: for both kinds, at each depth, the probability of the whole answer given the prompt and
        whether every token of it was the likeliest one; how many depths were found; the mean density.
    """
    if depths < 1:
        raise ValueError(f"depths is {depths}; allowed: 1 or more")
    at = np.linspace(0, 1, depths) if depths > 1 else np.array([0.5])
    probability, found, density = {"dense": [], "sparse": []}, {"dense": [], "sparse": []}, []
    with Bar("needle", 2 * depths * model.layers) as bar:
        for depth in at:
            ids = xp.asarray(planted.prompt(depth))
            for name in probability:
                attend = Attention(None if name == "dense" else settings, dense_rows)
                chance, likeliest = _answer(model, ids, len(planted.answer), prefill(model, ids, attend, step=bar.step))
                probability[name].append(chance)
                found[name].append(likeliest)
                density += [x for heads in attend.density.values() for x in heads]
    return {
        "tokens": len(ids),
        "answer_tokens": len(planted.answer),
        "dense_rows": dense_rows,
        "depth": at.tolist(),
        "probability": probability,
        "found": found,
        "times_found": {name: sum(x) for name, x in found.items()},
        "mean_density": float(np.mean(density)) if density else None,
    }


def _answer(model: Model, ids, length: int, hidden) -> tuple[float, bool]:
    """Probability of the last `length` tokens given those before, and whether each was the likeliest."""
    xp = namespace(ids)
    y = logits(model, hidden[-length - 1 : -1]).astype(np.float64)
    target = ids[-length:]
    top = y.max(axis=1)
    log_chance = y[xp.arange(length), target] - top - xp.log(xp.exp(y - top[:, None]).sum(axis=1))
    return math.exp(float(log_chance.sum())), bool((y.argmax(axis=1) == target).all())
