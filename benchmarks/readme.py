"""Fill the figures of the committed results into READMEs and a guide; a test compares them.

    python -m benchmarks readme

The project's own has one table and one figure, `benchmarks/README.md` has all results, the guide
`choosing-a-method.md` what each method costs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.results import RESULTS, load, machine_of, record_of
from d3pack.system import duration, size

README = Path(__file__).parents[1] / "README.md"
ALL_RESULTS = Path(__file__).with_name("README.md")
GUIDE = README.parent / "docs" / "guides" / "choosing-a-method.md"
BLOCK = re.compile(r"<!-- results -->.*<!-- /results -->", re.DOTALL)

RANDOM = ("webp", "jpeg", "sheet", "avif")  # photographs, by how they were chosen
CHOSEN = ("collages", "chosen", "rded")
BUDGETS = (6000, 10_000, 30_000, 100_000)
STANDARD = (
    ("cifar10", "cifar", 3000),
    ("cifar10", "cifar", 6000),
    ("cifar10", "cifar", 30_000),
    ("fashion-mnist", "fashion", 6000),
)
ROWS = {
    "pack": "a pack",
    "webp": "random photographs, WebP files",
    "jpeg": "random photographs, JPEG files",
    "sheet": "random photographs, tiles of one WebP picture",
    "avif": "random photographs, tiles of one AVIF picture",
    "collages": "photographs chosen by a teacher, tiles of one WebP picture",
    "chosen": "photographs chosen by a teacher, tiles of one {codec} picture",
    "rded": "crops chosen by a teacher (RDED), tiles of one {codec} picture",
    "names": "class names as prompts, same backbone, seeds not picked",
}
METHODS = {
    "d3m": "`d3m`: prompts for `mini`",
    "classcond": "`classcond`: a DiT trained on CIFAR-10",
    "minimax": "`minimax`: that DiT, fine-tuned",
    "ten times the weights": "the same with ten times the weights of its two criteria",
    "fine-tuned without": "the same without them",
}
METHOD_IMAGES, METHOD_PROTOCOLS = (10, 50), ("quick", "standard")  # that all have to have
NONE = "–"  # in a cell
METHODS_MOVED = """\
What each method of `encode` costs and teaches: [one table](../docs/guides/choosing-a-method.md)."""
# Until all methods were measured by one version of the code
METHODS_BEFORE = """\
The three methods, {method_images} images a class, students as above. Precision, recall and coverage
of the real images of a class are measured in the features of a teacher; only `d3m` picks its seeds,
with that teacher. Images a second were measured on {method_threads} cores that other work shared,
which moves one model from {slowest} to {fastest}. `minimax` was trained for 4,000 steps of 8
images, 0.64 of a pass, with an average of 0.999 that left out its start (its paper: 8 passes,
0.9999, from the start on). The rows come from several versions of the code. The same number of real
photographs, without loss, gives {real}. A DiT serves this data set alone and travels with the pack.

| method | pack | backbone | accuracy on real CIFAR-10 | precision / recall / coverage | images/s |
|---|---:|---:|---:|---:|---:|
{methods}"""
COSTS_BEFORE = """\
CIFAR-10 ({test_images} test images; `mini` was not trained on them), 50 images a class, measured \
on {date}. Students are of the protocol `quick`,
{seeds} seeds. The rows come from several versions of the code, and what encoding took was not \
kept; `classcond` was trained for {train}, `minimax` for {steps} steps, 0.64 of a pass, with an \
average of 0.999 that left out its start. Images/s: on cores that other work shared, which moves \
one model from {slowest} to {fastest}.
Only `d3m` picks its seeds here ([figures]({host}/methods.json)).

| `--method` | pack | backbone | images/s to decode | `quick` | precision / recall / coverage |
|---|---:|---:|---:|---:|---:|
{rows}"""
COSTS = """\
{target}: {train} training images, {test} test images, {seeds} students each, measured on {date} \
by `python -m benchmarks methods`,
one version of the code ([figures]({host}/{file})). Random photographs are others for each student.
{seen} Encoding is timed on {cores} (in parentheses: processor time), without the teacher, which
is trained once for all that ask it: {teacher}.
The first images of `codes`, `classcond` and `minimax` do not depend on their number: 10 of them
are the first of 50, and the time is that of 50.
The time of the `classcond` whose backbone `minimax` takes comes on top.

| `--method` | images a class | to encode | pack | backbone | images/s to decode | `quick` | \
`standard` | precision / recall / coverage |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}"""
HOST = "https://github.com/d3pack/d3pack/blob/main/benchmarks/results"
# The result of before: of the first ten classes, with other rules for the two sides
LEARNING_BEFORE = """\
Learning prompts: in the same examination, textual inversion as in diffusers takes {peer_samples}
samples a class and `encode` {our_samples}. The loss that textual inversion ends with is first
reached after {fewer} times fewer samples, first hit against first hit, and in {faster} times less
processor time ([all curves](results/encode.json)), more than half of which is not the method:
textual inversion passed its samples one by one, ours in batches. Not counted: judging, which ours
does alone, choosing collages, and encoding them once (textual inversion does so at every step). The
ten classes of CIFAR-10 are those that our optimiser was developed on, the rate of textual inversion
is that of its example, and ours was stored in i8. Both were examined on collages by which ours, but
not textual inversion, judged when to stop; ours every 80 samples, textual inversion every 400. Both
were run before prompts were fitted in groups of their own."""
LEARNING = """\
Learning prompts: `encode` against textual inversion as in diffusers, on classes that were drawn by
lot, examined alike on test images that neither side sees ([rules, costs and
curves](results/encode.json)). A hit is the first judgement at or below a loss, for either side.
Textual inversion takes {peer_samples} samples a class, {rates}.
`encode` takes {our_samples} samples a class of {tuned_on}; its prompts are examined as the pack
holds them. The last four columns: what textual inversion needs, in units of
ours, over the classes where both hit; -: no such class.

| data set | to the loss at the end of | `encode` hits | textual inversion hits | samples | \
processor time: learning | with judging and latents | with collages and teacher, for ours alone |
|---|---|---:|---:|---:|---:|---:|---:|
{rows}

{note}"""
SENT_NOT_YET = """\
A trained student in place of data: `python -m benchmarks sent_student`, not run to its end yet."""
SENT = """\
A trained student in place of data ([figures](results/sent_student.json)): a ConvNet-3 of {bits}
bits a weight that fits into the {bytes} B of the pack of {budget}, trained for {updates} updates on
all training images of {target}, recognises {own} of its test images{runs}; the next table has what
a ConvNet-3 learns from the pack. A receiver who wants another architecture, here {other}, has no
images: taught by the answers of the sent student to images of the class names, which cost no bytes,
it reaches {passed}; taught by the pack, {pack} (protocol `{protocol}`)."""
ACROSS_NOT_YET = """\
Packs taught to other students: `python -m benchmarks across`, not run to its end yet."""
ACROSS = """\
Students of several architectures on the same packs and photographs of CIFAR-10, which pilots of
ConvNet-3 chose (protocol `{protocol}`: {updates} updates; [figures](results/across-cifar10.json)).
Photographs are chosen and tuned as above; chosen by an earlier version of the code they taught
ConvNet-3 more, {before} (first table):

| student | a pack | accuracy | the best photographs | accuracy | points |
|---|---:|---:|---:|---:|---:|
{rows}"""
OTHER_STUDENTS = """\
How far packs are ahead of photographs, in points, depends on the network (CIFAR-10, {updates}
updates, {seeds} networks of each; ±: standard deviation of the difference):

| network | {sizes} |
|---|{rules}
{rows}{level}"""
SHARED = """\
What the gradients of the classes of a group agree on is followed where it leads downhill by a
class's own gradient. Of {classes} classes of {target} the loss on test images falls from {start} to
{agreed} by this rule, to {always} where every class follows it always, as before, and to {never}
where none does; the class that gains least gains {least_agreed}, {least_always} and
{least_never} ([curves](results/encode_shared.json), one run each)."""
NAMES = {
    "convnet3": "ConvNet-3",
    "vit6": "ViT of 6 blocks",
    "resnetap10": "ResNetAP-10",
    "resnet18": "ResNet-18 (stem of CIFAR)",
}
SETS = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST"}
SHORT = """\
Accuracy of a small network, {student}, on {test_images} test images, after {long_updates} updates \
on a dataset of so many bytes: mean
and standard deviation of {long_seeds} networks taught by one pack; chance is 10 %. Encoding \
again with another seed moves small packs
by {again} points (after {updates} updates). The diffusion model is not counted: {backbone}, \
shared by all packs, and
trained on photographs of ImageNet. The photographs are tiles of one AVIF picture. Those of \
CIFAR-10 were chosen by a classifier, their
size and quality by short trainings; those of Fashion-MNIST at random, another draw for each \
network, in the size and quality that did
best on test images.

| trained on | CIFAR-10, 3 kB | CIFAR-10, 6 kB | CIFAR-10, 30 kB | Fashion-MNIST, 6 kB |
|---|---:|---:|---:|---:|
| a pack | {pack_cifar_3000} | {pack_cifar_6000} | {pack_cifar_30000} | {pack_fashion_6000} |
| photographs | {chosen_cifar_3000} | {chosen_cifar_6000} | {chosen_cifar_30000} \
| {chosen_fashion_6000} |

![Accuracy of students against bytes, CIFAR-10](benchmarks/results/table-cifar10-standard.svg)

{other_students}

`encode --budget` chose what the packs hold, by short trainings: seeds alone in the first two, \
which need {bytes_cifar_3000} and {bytes_cifar_6000} B;
codes of photographs, too, in the third; codes alone in the last, of small grey images that the \
diffusion model has not seen,
where the two are level. At 100 kB photographs win, measured without codes for {updates} updates:
{chosen_100000}, as tiles of a WebP picture (AVIF was not measured there), against
{pack_100000}; at 30 kB, the two are level without codes. [All results](benchmarks/README.md) \
tells how each was made,
with speed and sizes; `d3pack eval` makes such a table of your own images."""
TEXT = """\
CIFAR-10 as a pack for `mini`, which was trained on other photographs
([the pack](results/table-cifar10-6000.d3m)). Students are {student}, trained for
{updates} updates by the protocol `quick`, {seeds} seeds, tested on {test_images} real images;
chance is 10 %.

| trained on | images | bytes | accuracy on real CIFAR-10 |
|---|---:|---:|---:|
{rows}

The backbone is not counted: {backbone}, shared by all packs that use it. Decoding took
{decode_seconds} s on one core. ± is the standard deviation over the students of one pack, or over
draws of photographs; encoding again with another seed moves accuracy more: packs of 50 derived
seeds a class by {again} points (deviation of three encodings,
[CIFAR-10](results/again-cifar10.json) and [Fashion-MNIST](results/again-fashion-mnist.json)).
Random photographs were tuned over five settings a format by one pilot each, and those that a
teacher chose have the same settings; `eval` now compares up to twelve, the best third by a pilot of
full length. Guidance was set by hand to 1 (Fashion-MNIST: 4) for packs of 10, 30 and 100 kB, as
their teachers' lengths were; that of 100 kB holds 30,000 bytes of soft labels (of Fashion-MNIST,
those of 30 and 100 kB hold labels).
Part of the difference to class names comes from picked seeds: with 50 images a class and seeds
picked for both, class names reach {names_picked} and learned prompts {prompts_picked}
([four vectors a class](results/encode_ablation.json), 4,000 test images, not 10,000).

![Accuracy of students against bytes, CIFAR-10](results/table-cifar10.svg)

More bytes help photographs more than packs: those that a teacher chooses meet packs at {met} kB.
CIFAR-10, by size of the payload ([all rows](results/table-cifar10.md)):

| trained on | 6 kB | 10 kB | 30 kB | 100 kB |
|---|---:|---:|---:|---:|
| a pack | {pack_6000} | {pack_10000} | {pack_30000} | {pack_100000} |
| the best random photographs | {random_6000} | {random_10000} | {random_30000} | {random_100000} |
| the best chosen photographs | {chosen_6000} | {chosen_10000} | {chosen_30000} | {chosen_100000} |

AVIF, the better codec elsewhere, was not measured at 100 kB. The packs make {packed} images a
class, set by hand for each size. Packs were measured in an earlier, larger container: written
today, the pack of {smallest} bytes has {rewritten}, with the same images.

All of this is without codes. The next table is with them, and with students trained for
{long_updates} updates by the protocol `standard`, {long_seeds} seeds. Pilots chose what the packs
hold: students tested on training images that were held back. A teacher chose the photographs of
CIFAR-10, and pilots the best of {settings} settings of AVIF: short ones, where today the best third
are trained to the end. For Fashion-MNIST, photographs that a teacher chose reach {misled}, and
random ones {piloted}, another draw for each student, with the settings that today's pilots choose.
Random ones do better with settings that were set by hand since they had done so on test images, so
these stand here (all figures of [CIFAR-10](results/table-cifar10-standard.json) and of
[Fashion-MNIST](results/table-fashion-mnist-standard.json)):

| | pack | images a class | bytes of codes | accuracy | the best photographs | accuracy |
|---|---:|---:|---:|---:|---|---:|
| CIFAR-10, 3 kB | {bytes_cifar_3000} B | {images_cifar_3000} | {codes_cifar_3000} \
| {pack_cifar_3000} | {payload_cifar_3000} | {chosen_cifar_3000} |
| CIFAR-10, 6 kB | {bytes_cifar_6000} B | {images_cifar_6000} | {codes_cifar_6000} \
| {pack_cifar_6000} | {payload_cifar_6000} | {chosen_cifar_6000} |
| CIFAR-10, 30 kB | {bytes_cifar_30000} B | {images_cifar_30000} | {codes_cifar_30000} \
| {pack_cifar_30000} | {payload_cifar_30000} | {chosen_cifar_30000} |
| Fashion-MNIST, 6 kB | {bytes_fashion_6000} B | {images_fashion_6000} | {codes_fashion_6000} \
| {pack_fashion_6000} | {payload_fashion_6000} | {chosen_fashion_6000} |

{versions} Written today, packs with codes
have about a hundred bytes less, with the same images. All training images of CIFAR-10 give
{whole} by this protocol (one run).

Without codes, packs lose on Fashion-MNIST, small grey images that `mini` has not seen
([all rows](results/table-fashion-mnist.md)): a pack of {fashion_pack_bytes} B gives
{fashion_pack}, random images in {fashion_random_bytes} B give {fashion_random}, images chosen by a
teacher {fashion_chosen}, class names {fashion_names}.

{methods_here}

`mini`: a classifier of 202 classes recognises images made from class names {recognised}. Its
autoencoder reaches {psnr} dB.

{learning}

Speed, on {decode_threads} cores: `mini` decodes {decode_rate} images a second, exactly, which is
{over_pipeline} times the rate of diffusers' pipeline at its best batch size. From the second epoch
on, `dataset.loader()` returns {loader_d3m} images a second; a folder of JPEG files gives
{loader_jpeg}, raw pixels in MDS {loader_mds}, in WebDataset {loader_webdataset}, a tensor in memory
{loader_tensor} (no workers).

`encode` fits a sampler of five steps for `mini`, in place of the twelve of the published one
([figures](results/fitted.json)). Two packs of CIFAR-10, {fitted_images} images with guidance
{fitted_guidance}, are decoded at {fitted_rate} and {published_rate} images a second on \
{fitted_threads} cores;
students reach {fitted_accuracy} with fitted steps and {published_accuracy} without. Latents miss
those of sixty steps by {fitted_error} of their variance, and by {published_error} with the \
published sampler. With five steps and `--one-pass`, prompts do most of what guidance does, and a
pack is decoded at {one_pass_rate} images a second; its students reach {one_pass_accuracy}.

Codes of {codes_bytes} bytes, on {codes_cores}: with `mini`, {codes_encoded} photographs
a second are coded, {codes_tried} where four choices are tried at each level, and {codes_decoded}
are decoded. Over batch sizes, orders, threads and processes, {codes_differing} bytes of decoded
images differ ([all sizes](results/codes.json)).

A pack of 1,000 classes with one vector of 768 values each has {bytes_f16} bytes in f16 and
{bytes_i4} in i4, however many images it makes. Picked seeds add two to six bits an image.

Two other ways to send a data set are asked for. Labels alone: PLADA (arXiv 2602.23358) reports
under 1 MB for labels of a public set of photographs that every receiver has loaded before; a pack
whose images are somebody's photographs is not ours to ship, so no row of it stands here.

{sent}

{across}

Figures in the documentation that no file of results holds were measured once, as the text says."""

TEXTS = {README: SHORT, ALL_RESULTS: TEXT}


def percent(row: Mapping[str, Any]) -> str:
    """Return mean and deviation of a row, or what it has of one run."""
    if len(row["runs"]) == 1:
        return f"{100 * row['last']['mean']:.1f} % (one run)"
    return f"{100 * row['last']['mean']:.1f} ± {100 * row['last']['std']:.1f} %"


def digits(figure: float) -> str:
    """Return a number to three digits."""
    return f"{round(figure, 3 - len(str(int(figure)))):,.0f}"


def best(rows: Mapping[str, Any], budget: int, *entries: str) -> dict[str, Any]:
    """Return the best row of a budget among some entries."""
    of_budget = [row for row in rows.values() if row["arm"] in entries and row["budget"] == budget]
    return max(of_budget, key=lambda row: row["last"]["mean"])


def met(rows: Mapping[str, Any], entries: Sequence[str]) -> int:
    """Return the first budget at which the best of some entries is within deviations of a pack."""
    for budget in BUDGETS:
        pack, other = rows[f"pack {budget:,} B"]["last"], best(rows, budget, *entries)["last"]
        if other["mean"] + other["std"] >= pack["mean"] - pack["std"]:
            return budget
    raise ValueError("they do not meet: the README has to say so")


def span(values: Sequence[float]) -> str:
    """Return the least and the most of some ratios."""
    words = [f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in sorted(values)]
    return words[0] if words[0] == words[-1] else f"{words[0]} to {words[-1]}"


def learning_rows(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the rows of a data set: the races to the end of either side."""
    name = SETS.get(found["name"], found["name"])
    for end, title in (("peer's end", "textual inversion"), ("our end", "`encode`")):
        races = [one["to"][end] for one in found["classes"]]
        hits = [
            f"{sum(race[side] is not None for race in races)} of {len(races)}"
            for side in ("ours", "peer")
        ]
        ratios = [race["times"] for race in races if "times" in race]
        cells = [
            span([each[kind] for each in ratios]) if ratios else "-"
            for kind in ("samples", "inversion", "judged", "all")
        ]
        yield f"| {' | '.join([name, title, *hits, *cells])} |"


def learning(figures: Mapping[str, Any]) -> str:
    """Return what prompts of `encode` cost beside textual inversion."""
    if "sets" not in figures:
        return learning_before(figures)
    first, rate = figures["sets"]["first"], f"{figures['tuning']['rate']:g}"
    rates = f"with the rate of its example ({figures['peer']['rate']:g})"
    best = f"best for a class of\n{SETS.get(first['name'], first['name'])} that is not examined"
    if rate == f"{figures['peer']['rate']:g}":
        rates += f", which was {best}"
    else:
        rates += f" and with the one that was {best} ({rate}); the run that hits first counts"
    all_classes, count = first["ours_all_classes"], first["source"]["classes"]
    note = f"The classes of {SETS.get(first['name'], first['name'])} are those that our optimiser"
    note += " was developed on"
    if second := figures["sets"].get("second"):
        note += f"; {SETS.get(second['name'], second['name'])} was examined once, at the end"
    return LEARNING.format(
        peer_samples=f"{figures['peer']['steps'] * figures['peer']['accumulate']:,}",
        our_samples=f"{all_classes['samples'] / count:,.0f}",
        rates=rates,
        tuned_on=SETS.get(first["name"], first["name"]),
        rows="\n".join(row for found in figures["sets"].values() for row in learning_rows(found)),
        note=f"{note}.",
    )


def learning_before(figures: Mapping[str, Any]) -> str:
    """Return the same of a result of before, under its own rules."""
    steps, accumulate = (figures["peer_recipe"][name] for name in ("steps", "accumulate"))
    fewer, faster = [], []
    for one in figures["classes"]:
        ours, end = one["recipe"]["ours"], one["curve"][-1]["loss"]
        peer = next(point for point in one["curve"] if point["loss"] <= end)
        fewer.append(peer["samples"] / ours["samples"])
        faster.append(peer["seconds"] / ours["seconds"])
    return LEARNING_BEFORE.format(
        peer_samples=f"{steps * accumulate:,}",
        our_samples=f"{figures['ours_all_classes']['samples'] / len(fewer):,.0f}",
        fewer=f"{min(fewer):.0f} to {max(fewer):.0f}",
        faster=f"{min(faster):.0f} to {max(faster):.0f}",
    )


def accuracy_figures() -> dict[str, str]:
    """Return the figures of the tables of accuracy against bytes."""
    table, fashion = load("table-cifar10"), load("table-fashion-mnist")
    rows, others = table["rows"], fashion["rows"]
    lines = []
    for entry, title in ROWS.items():
        row = rows.get(entry if entry == "names" else f"{entry} 6,000 B")
        if row is None:
            continue
        title = title.format(codec=row["detail"].get("payload", "").split(" ")[0])
        images = row["runs"][0]["images"]
        lines.append(f"| {title} | {images:,} | {row['bytes']:,.0f} B | {percent(row)} |")
    first = rows["pack 6,000 B"]["runs"]
    fashion_random = best(others, 6000, *RANDOM)
    figures = {
        "student": first[0]["student"],
        "updates": str(first[0]["updates"]),
        "seeds": str(len(first)),
        "test_images": f"{table['test_images']:,}",
        "rows": "\n".join(lines),
        "backbone": f"{table['packs']['6000']['ledger']['backbone'] / 1e6:.1f} MB",
        "decode_seconds": f"{table['packs']['6000']['decode_seconds']:.0f}",
        "smallest": f"{min(r['bytes'] for r in rows.values() if r['arm'] == 'pack'):,.0f}",
        "rewritten": f"{table['packs']['6000']['rewritten']['bytes']:,}",
        "fashion_pack": percent(others["pack 6,000 B"]),
        "fashion_pack_bytes": f"{others['pack 6,000 B']['bytes']:,.0f}",
        "fashion_random": percent(fashion_random),
        "fashion_random_bytes": f"{fashion_random['bytes']:,.0f}",
        "fashion_chosen": percent(best(others, 6000, *CHOSEN)),
        "fashion_names": percent(others["names"]),
        "real": percent(rows["random"]),
        "met": str(met(rows, CHOSEN) // 1000),
        "packed": ", ".join(str(table["packs"][str(b)]["images_per_class"]) for b in BUDGETS),
    }
    for budget in BUDGETS:
        figures[f"pack_{budget}"] = percent(rows[f"pack {budget:,} B"])
        figures[f"random_{budget}"] = percent(best(rows, budget, *RANDOM))
        figures[f"chosen_{budget}"] = percent(best(rows, budget, *CHOSEN))
    for key, row in load("encode_ablation").items():
        accuracy = f"{100 * row['accuracy']:.1f} ± {100 * stdev(row['seeds']):.1f} %"
        if key.startswith("steps=0,cool=0 |"):
            figures["names_picked"] = accuracy
        elif key.startswith("default |"):
            figures["prompts_picked"] = accuracy
    return figures


def standard_figures() -> dict[str, str]:
    """Return the figures of packs whose content pilots chose, by the protocol `standard`."""
    figures: dict[str, str] = {}
    seeds, updates, codes = set(), set(), set()
    for name, short, budget in STANDARD:
        table = load(f"table-{name}-standard")
        pack = table["rows"][f"pack {budget:,} B"]
        chosen = best(table["rows"], budget, *RANDOM, *CHOSEN)
        seeds.add(len(pack["runs"]))
        updates |= {row["runs"][0]["updates"] for row in (pack, chosen)}
        codes |= {row.get("made", {}).get("code") for row in (pack, chosen)}
        made, key = table["packs"][str(budget)], f"{short}_{budget}"
        figures |= {
            f"pack_{key}": percent(pack),
            f"chosen_{key}": percent(chosen),
            f"bytes_{key}": f"{pack['bytes']:,.0f}",
            f"images_{key}": str(made["images_per_class"]),
            f"codes_{key}": f"{made['ledger']['sections'].get('codes', 0):,}",
            f"payload_{key}": chosen["detail"]["payload"],
        }
    if None in codes:
        figures["versions"] = "Not all rows say by which version of the code they were made."
    elif len(codes) > 1:
        figures["versions"] = f"The rows come from {len(codes)} versions of the code."
    else:
        figures["versions"] = "The rows come from one version of the code."
    (figures["long_seeds"],) = map(str, seeds)  # all rows have the same
    (figures["long_updates"],) = (f"{number:,}" for number in updates)
    misled = load("table-fashion-mnist-standard")["rows"]["chosen 6,000 B"]
    figures |= {"again": spread_again(), "settings": numbers_of_settings()}
    figures["misled"] = percent(misled)
    figures["piloted"] = percent(load("table-fashion-mnist-standard")["rows"]["avif 6,000 B"])
    whole = load("table-cifar10-standard")["rows"]["whole"]
    assert len(whole["runs"]) == 1
    figures["whole"] = f"{100 * whole['last']['mean']:.1f} %"
    return figures


def spread(values: Sequence[float]) -> str:
    """Return mean and deviation of accuracies, or what one run has."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f} %"
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f} %"


def sent(figures: Mapping[str, Any]) -> str:
    """Return what a student does that is sent in the bytes of a pack."""
    texts = []
    for name, budgets in figures.items():
        for budget, found in sorted(budgets.items(), key=lambda pair: int(pair[0])):
            runs = list(found["runs"].values())
            text = SENT.format(
                bits=found["bits"],
                bytes=f"{found['pack']['bytes']:,}",
                budget=size(int(budget)),
                updates=f"{found['updates']:,}",
                target=SETS.get(name, name),
                other=NAMES.get(found["other"], found["other"]),
                runs=" (one run, as those that follow)" if len(runs) == 1 else "",
                protocol=found["protocol"],
                own=spread([run["own"] for run in runs]),
                passed=spread([run["sent student labels images of class names"] for run in runs]),
                pack=spread([run["pack"] for run in runs]),
            )
            texts.append(text)
    return "\n\n".join(texts) or SENT_NOT_YET


def pairs_of(rows: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the rows of packs of `across`, each with that of photographs for the same student."""
    return [
        (row, other)
        for row in rows.values()
        if row["arm"] == "pack"
        and (other := rows.get(f"{row['student']}, photographs, {row['budget']:,} B"))
    ]


def lead(pack: Mapping[str, Any], photographs: Mapping[str, Any]) -> float:
    """Return by how many points a pack is ahead."""
    points: float = 100 * (pack["last"]["mean"] - photographs["last"]["mean"])
    return points


def across(figures: Mapping[str, Any]) -> str:
    """Return what students of other architectures learn from packs and from photographs."""
    pairs = pairs_of(figures.get("rows", {}))
    if not pairs:
        return ACROSS_NOT_YET
    lines = []
    for row, other in pairs:
        cells = [NAMES.get(row["student"], row["student"])]
        cells += [cell for one in (row, other) for cell in (f"{one['bytes']:,.0f} B", percent(one))]
        lines.append(f"| {' | '.join(cells)} | {lead(row, other):+.1f} |")
    (updates,) = {run["updates"] for row, other in pairs for run in (*row["runs"], *other["runs"])}
    before = percent(best(load("table-cifar10")["rows"], 6000, *CHOSEN))
    return ACROSS.format(
        before=before, protocol=figures["protocol"], updates=f"{updates:,}", rows="\n".join(lines)
    )


def other_students(figures: Mapping[str, Any]) -> str:
    """Return by how much packs are ahead with each architecture, a column for every size."""
    pairs = pairs_of(figures.get("rows", {}))
    budgets = sorted({row["budget"] for row, _ in pairs})
    if not budgets:
        return ""
    cells: dict[str, dict[int, str]] = {}
    sizes: dict[int, str] = {}
    level: dict[int, list[str]] = {}  # networks that learn no more from packs
    for row, other in pairs:
        spread = 100 * math.hypot(row["last"]["std"], other["last"]["std"])
        name = NAMES.get(row["student"], row["student"])
        cells.setdefault(name, {})[row["budget"]] = f"{lead(row, other):+.1f} ± {spread:.1f}"
        if lead(row, other) <= spread:
            level.setdefault(row["budget"], []).append(name)
        sizes[row["budget"]] = f"pack {row['bytes']:,.0f} B, photographs {other['bytes']:,.0f} B"
    (updates,) = {run["updates"] for pair in pairs for one in pair for run in one["runs"]}
    rows = [
        f"| {name} | {' | '.join(found.get(budget, '-') for budget in budgets)} |"
        for name, found in cells.items()
    ]
    return OTHER_STUDENTS.format(
        updates=f"{updates:,}",
        seeds=either({len(one["runs"]) for pair in pairs for one in pair}),
        sizes=" | ".join(sizes[budget] for budget in budgets),
        rules="---:|" * len(budgets),
        rows="\n".join(rows),
        level="".join(
            f"\n\nFor {' and '.join(names)}, packs of {budget / 1000:,.0f} kB are not ahead by more"
            " than that deviation."
            for budget, names in sorted(level.items())
        ),
    )


def shared(figures: Mapping[str, Any]) -> str:
    """Return what three rules for the shared part of a step come to."""
    rules, name = figures["rules"], figures["source"]["name"]
    return SHARED.format(
        classes=len(rules["agreed"]["curves"]),
        target=SETS.get(name, name),
        start=f"{rules['agreed']['start_loss']:.4f}",
        **{rule: f"{found['loss']:.4f}" for rule, found in rules.items()},
        **{f"least_{rule}": f"{found['least_gain']:.4f}" for rule, found in rules.items()},
    )


def spread_again() -> str:
    """Return by how many points encoding again with another seed moves packs."""
    rows = [row for name in SETS for row in load(f"again-{name}")["by_samples"].values()]
    points = [100 * stdev(row["accuracies"]) for row in rows]
    return f"{min(points):.1f} to {max(points):.1f}"


def numbers_of_settings() -> str:
    """Return among how many settings pilots chose for photographs, by data set."""
    tried = {
        name: {
            len(row["detail"]["pilot"])
            for row in load(f"table-{name}-standard")["rows"].values()
            if row["arm"] == "chosen"
        }
        for name in SETS
    }
    (usual,), (fashion,) = tried["cifar10"], tried["fashion-mnist"]
    return f"{usual} (Fashion-MNIST: {fashion})"


def likeness(row: Mapping[str, Any]) -> str:
    """Return precision, recall and coverage of the images of a row."""
    names, figures = ("precision", "recall", "coverage"), row["likeness"]
    return " / ".join(f"{figures[name]:.2f}" if name in figures else NONE for name in names)


def all_measured() -> bool:
    """Return whether one version of the code has been measured with every method, in full."""
    figures = load("methods-cifar10")
    rows, names = figures.get("rows", {}), figures.get("ways", ())
    return bool(names) and all(
        rows.get(f"{name} {count}", {}).get("students", {}).get(protocol)
        for name, count, protocol in product(names, METHOD_IMAGES, METHOD_PROTOCOLS)
    )


def method_figures() -> dict[str, str]:
    """Return the figures of the three methods of before."""
    rows = load("methods")["rows"]
    lines = []
    for name, title in METHODS.items():
        row = rows[name]
        lines.append(
            f"| {title} | {row['bytes']:,} B | {row['backbone_bytes'] / 1e6:.1f} MB"
            f" | {percent(row['student'])} | {likeness(row)}"
            f" | {row['speed']['images_per_second']:.0f} |"
        )
    of_dit = [rows[name]["speed"]["images_per_second"] for name in METHODS if name != "d3m"]
    return {
        "slowest": f"{min(of_dit):.0f}",
        "fastest": f"{max(of_dit):.0f}",
        "method_images": str(rows["d3m"]["images_per_class"]),
        "method_threads": str(rows["d3m"]["speed"]["threads"]),
        "methods": "\n".join(lines),
    }


def costs_before() -> str:
    """Return what is known of the methods from before one command measured all of them."""
    record = record_of("methods")
    extra = {
        name: row["provenance"]["options"].get("extra", {})
        for name, row in record["figures"]["rows"].items()
    }
    rows = [
        f"| `{name}` | {row['bytes']:,} B | {row['backbone_bytes'] / 1e6:.1f} MB,"
        f" {'shared' if name == 'd3m' else 'its own'} | {row['speed']['images_per_second']:.0f}"
        f" | {percent(row['student'])} | {likeness(row)} |"
        for name, row in record["figures"]["rows"].items()
        if name in ("d3m", "classcond", "minimax")
    ]
    moved = method_figures()
    return COSTS_BEFORE.format(
        slowest=moved["slowest"],
        fastest=moved["fastest"],
        date=record["date"],
        train=duration(extra["classcond"]["train_seconds"]),
        steps=f"{int(extra['minimax']['train_steps']):,}",
        seeds=len(record["figures"]["rows"]["d3m"]["student"]["runs"]),
        test_images=f"{load('table-cifar10')['test_images']:,}",
        host=HOST,
        rows="\n".join(rows),
    )


def took(figures: Mapping[str, Any]) -> str:
    """Return seconds, and those of the processor, which other work there does not change."""
    return f"{duration(figures['seconds'])} ({duration(figures['cpu_seconds'])})"


def cost_row(row: Mapping[str, Any]) -> str:
    """Return the line of a pack."""
    students = row["students"]
    taught = (percent(students[name]) if name in students else NONE for name in METHOD_PROTOCOLS)
    cells = [*pack_cells(row), *taught, likeness(row)]
    return f"| {' | '.join(cells)} |"


def pack_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells on a pack; photographs, which are none, have two."""
    count = f"{row['images_per_class']}"
    if "encode" not in row:
        return [row["title"], count, *[NONE] * 4]
    extra = ["teacher"] * row["asks_teacher"] + [f"`{row['after']}`"] * bool(row["after"])
    whose = "its own" if row["own_backbone"] else "shared"
    backbone = f"{row['backbone_bytes'] / 1e6:.1f} MB, {whose}"
    return [
        f"`{row['title']}`",
        count,
        " + ".join([took(row["encode"]), *extra]),
        f"{row['bytes']:,} B",
        backbone if row["backbone_bytes"] else "in the pack",
        f"{row['speed']['images_per_second']:.0f}",
    ]


def either(numbers: Iterable[int]) -> str:
    """Return `1 or 3`."""
    return " or ".join(map(str, sorted(numbers)))


def seen(classes: Mapping[str, bool]) -> str:
    """Return on which classes' photographs `mini` was trained."""
    known = [name for name, is_seen in classes.items() if is_seen]
    if not known:
        return "`mini` was trained on photographs of none of its classes."
    if len(known) == len(classes):
        return "`mini` was trained on photographs of all of its classes."
    other = [name for name in classes if name not in known]
    return f"`mini` was trained on photographs of {', '.join(known)}; not of {', '.join(other)}."


def cost_table(file: str, record: Mapping[str, Any]) -> str:
    """Return the table of one target: what was measured, from cheap to dear."""
    figures, machine = record["figures"], record["machine"]
    rows = sorted(
        figures["rows"].values(),
        key=lambda row: (figures["ways"].index(row["way"]), row["images_per_class"]),
    )
    threads = {row["encode"]["threads"] for row in rows if "encode" in row}
    seeds = {len(taught["runs"]) for row in rows for taught in row["students"].values()}
    return COSTS.format(
        target=SETS.get(figures["target"], figures["target"]),
        train=f"{figures['images']['train']:,}",
        test=f"{figures['images']['test']:,}",
        date=record["date"],
        seeds=either(seeds) or "no",
        seen=seen(figures["classes"]),
        cores=f"{either(threads)} of {machine['cores']} cores",
        teacher=took(figures["teacher"]),
        host=HOST,
        file=file,
        rows="\n".join(map(cost_row, rows)),
    )


def costs() -> str:
    """Return the tables of all targets, and the one of before until they have its rows."""
    files = sorted(path.name for path in RESULTS.glob("methods-*.json"))
    tables = [cost_table(file, record_of(file.removesuffix(".json"))) for file in files]
    return "\n\n".join([*tables, *([] if all_measured() else [costs_before()])])


def other_figures() -> dict[str, str]:
    """Return the figures of backbone, encoding, decoding, loading and sizes."""
    backbone, decode = load("backbone"), load("decode")["speed"]
    ours = decode["result"]["stable-diffusion"]
    alone = load("loader")["second"]["workers_0"]
    rates = {name: digits(row["images_per_second"]) for name, row in alone.items()}
    sizes = load("format")["sizes"]
    recognised = [
        f"{100 * row['recognised_share']['top1']:.0f} % as often as real ones at guidance"
        f" {row['guidance']:g}"
        for row in backbone["by_guidance"]
    ]
    return {
        "recognised": " and ".join(recognised),
        "psnr": f"{backbone['autoencoder_psnr']:.1f}",
        "sent": sent(load("sent_student")),
        "across": across(load("across-cifar10")),
        "other_students": other_students(load("across-cifar10")),
        "learning": f"{learning(load('encode'))}\n\n{shared(load('encode_shared'))}",
        "decode_threads": str(decode["threads"]),
        "decode_rate": f"{ours['rates']['exact']['images_per_second']:.0f}",
        "over_pipeline": f"{ours['exact_over_best_pipeline']['images_per_second']:.1f}",
        "loader_d3m": rates["d3m loader, disk"],
        "loader_jpeg": rates["JPEG files"],
        "loader_mds": rates["MDS, raw"],
        "loader_webdataset": rates["WebDataset, raw"],
        "loader_tensor": rates["tensor.index_select"],
        "bytes_f16": f"{sizes['1000_classes_f16']['bytes']:,}",
        "bytes_i4": f"{sizes['1000_classes_i4']['bytes']:,}",
    }


def fitted_figures() -> dict[str, str]:
    """Return the figures of few fitted steps, of one pass, and of the published sampler."""
    rows = load("fitted")
    figures: dict[str, str] = {}
    arms = {"fitted": "fitted 5", "one_pass": "one pass 5", "published": "published"}
    for name, arm in arms.items():
        row = rows[arm]
        accuracy, rates = row["accuracy"], row["images_per_second"]
        figures |= {
            f"{name}_rate": f"{sorted(rates)[len(rates) // 2]:.0f}",
            f"{name}_accuracy": f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %",
            f"{name}_error": f"{100 * row['distance']['own']:.1f} %",
        }
    assert rows["published"]["guidance"] == rows["fitted 5"]["guidance"]
    return figures | {
        "fitted_images": str(rows["fitted 5"]["images"]),
        "fitted_guidance": f"{rows['fitted 5']['guidance']:g}",
        "fitted_threads": str(machine_of("fitted")["threads"]),
    }


def code_figures() -> dict[str, str]:
    """Return the figures of codes as `encode` makes them where nothing is said."""
    codes, threads = load("codes"), machine_of("codes")["threads"]
    usual, tried = codes["codes"][:2]
    return {
        "codes_cores": "one core" if threads == 1 else f"{threads} cores",
        "codes_bytes": f"{usual['bytes']:.0f}",
        "codes_encoded": f"{usual['encoded_per_second']:.0f}",
        "codes_tried": f"{tried['encoded_per_second']:.0f}",
        "codes_decoded": f"{usual['decoded_per_second']:.0f}",
        "codes_differing": str(codes["equality"]["differing_bytes"]),
    }


def blocks() -> dict[Path, str]:
    """Return the block of results of each page."""
    figures = accuracy_figures() | standard_figures() | method_figures() | other_figures()
    figures |= code_figures() | fitted_figures()
    methods = METHODS_MOVED if all_measured() else METHODS_BEFORE.format_map(figures)
    figures |= {"methods_here": methods}
    texts = {path: text.format_map(figures) for path, text in TEXTS.items()} | {GUIDE: costs()}
    return {path: f"<!-- results -->\n{text}\n<!-- /results -->" for path, text in texts.items()}


def main(arguments: Sequence[str]) -> None:
    """Write the blocks into the pages."""
    for path, block in blocks().items():
        before, after = BLOCK.split(path.read_text("utf-8"))
        path.write_text(f"{before}{block}{after}", "utf-8")
