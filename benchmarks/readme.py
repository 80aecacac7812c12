"""Put the figures of the README where they belong, from the committed results alone.

python benchmarks/readme.py        # a test fails while README and results differ
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TITLES = {
    "pack": "a pack",
    "webp": "random photographs, WebP files",
    "jpeg": "random photographs, JPEG files",
    "sheet": "random photographs, tiles of one WebP picture",
    "avif": "random photographs, tiles of one AVIF picture",
    "collages": "photographs that a teacher has chosen (RDED), tiles of one WebP picture",
    "chosen": "photographs that a teacher has chosen (RDED), tiles of one AVIF picture",
    "names": "class names as prompts, same backbone, seeds not picked",
}
README = HERE.parent / "README.md"
BLOCK = re.compile(r"<!-- results -->.*<!-- /results -->", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))
    return data


def about(figure: int) -> str:
    """Three digits of it."""
    return f"{round(figure, 3 - len(str(figure))):,}"


def worth() -> str:
    """A small pack beside as many bytes of everything else."""
    table, about_pack = load("table-cifar10"), load("table-cifar10")["packs"]["6000"]
    lines = []
    for arm in ("pack", "webp", "jpeg", "sheet", "avif", "collages", "chosen", "names"):
        row = table["rows"][arm if arm == "names" else f"{arm} 6,000 B"]
        mean, std = 100 * row["last"]["mean"], 100 * row["last"]["std"]
        images = row["runs"][0]["images"]
        nbytes = f"{row['bytes']:,.0f} B"
        lines.append(f"| {TITLES[arm]} | {images:,} | {nbytes} | {mean:.1f} ± {std:.1f} % |")
    head = "| a student trained on | images | bytes | reads real CIFAR-10 |\n|---|---:|---:|---:|"
    student = table["rows"]["pack 6,000 B"]["runs"][0]
    ablation = load("encode_ablation")
    named, learned = (
        f"{100 * row['accuracy']:.1f} ± {100 * row['std']:.1f} %"
        for start in ("steps=0,cool=0 |", "default |")
        for key, row in ablation.items()
        if key.startswith(start)
    )
    return (
        "CIFAR-10 as a pack for `mini`, which was trained on other photographs (it is"
        " [this very file](benchmarks/results/table-cifar10-6000.d3m)); students are"
        f" {student['student']},"
        f" {student['updates']} updates, preset `{table['protocol']['preset']['name']}`,"
        f" {len(table['rows']['pack 6,000 B']['runs'])} seeds, {table['test_images']:,} real test"
        f" images, chance 10 %:\n\n{head}\n" + "\n".join(lines) + "\n\n"
        f"Beside each pack stands the backbone, {about_pack['ledger']['backbone'] / 1e6:.1f} MB,"
        f" shared by all packs for it; decoding took {about_pack['decode_seconds']:.0f} s of one"
        " core. ± is the deviation of the students of one pack, or of the draws of photographs;"
        " encoding again moves a pack's row by up to a point. The pack is ahead of class names by"
        " prompts, picked seeds and guidance together: with 50 images a class and seeds picked for"
        f" both, names reach {named} and learned prompts {learned}"
        " ([four vectors a class](benchmarks/results/encode_ablation.json))."
        " `d3pack eval` makes such a table for your pack, with a page to look at."
    )


def curve(name: str, title: str) -> str:
    """Accuracy against bytes, and where real images overtake."""
    table = load(f"table-{name}")
    chance = 1 / len(table["classes"])
    best: dict[str, dict[int, float]] = {"pack": {}, "random": {}, "chosen": {}}
    kinds = {"pack": "pack", **dict.fromkeys(("sheet", "avif", "webp", "jpeg"), "random")}
    for row in table["rows"].values():
        if row["budget"]:
            kind = best[kinds.get(row["arm"], "chosen")]
            kind[row["budget"]] = max(kind.get(row["budget"], 0.0), row["last"]["mean"] - chance)
    said = []
    for kind, what in (
        ("random", "random photographs in as many bytes"),
        ("chosen", "photographs that a teacher has chosen (RDED)"),
    ):
        small = [b for b in sorted(best["pack"]) if b <= 10_000 and b in best[kind]]
        ratios = [f"{best['pack'][b] / best[kind][b]:.1f} (at {b // 1000} kB)" for b in small]
        most = max(best["pack"].values())
        # a point is what separates two encodes of one recipe
        near = [(b, gain) for b, gain in sorted(best[kind].items()) if gain >= most - 0.01]
        after = ""
        if near:
            word = "overtaken" if near[0][1] >= most else "met"
            after = f", and are {word} at {near[0][0] // 1000} kB"
        said.append(f"{' and '.join(ratios)} times as much as {what}{after}")
    made = [
        f"{about_pack['images_per_class']} at {int(budget) // 1000} kB"
        for budget, about_pack in sorted(table["packs"].items(), key=lambda item: int(item[0]))
    ]
    least = min(row["bytes"] for row in table["rows"].values() if row["arm"] == "pack")
    return (
        f"![Accuracy of students against the bytes they were sent, {title}]"
        f"(benchmarks/results/table-{name}.svg)\n\n"
        f"{title} at other sizes ([table](benchmarks/results/table-{name}.md),"
        f" images a class from each pack: {', '.join(made)}). Above chance, packs teach"
        f" {'; '.join(said)}. The smallest pack here has {least:,.0f} bytes: its hashes, recipe"
        " and origin weigh more than its prompts, so ten classes do not fit into 3 kB."
    )


def stranger() -> str:
    """A target that mini knows less well."""
    table = load("table-fashion-mnist")
    rows = table["rows"]

    def of(key: str) -> str:
        return f"{100 * rows[key]['last']['mean']:.1f} %"

    def best(*arms: str) -> str:
        return max((f"{arm} 6,000 B" for arm in arms), key=lambda key: rows[key]["last"]["mean"])

    random, chosen = best("sheet", "avif", "webp", "jpeg"), best("collages", "chosen")
    (images,) = {about_pack["images_per_class"] for about_pack in table["packs"].values()}
    return (
        "Fashion-MNIST, small grey things on black that `mini` has never seen and that pictures"
        " hold in few bytes, is where packs lose"
        " ([table](benchmarks/results/table-fashion-mnist.md)):"
        f" {of('pack 6,000 B')} from a pack of {rows['pack 6,000 B']['bytes']:,.0f} B, {of(random)}"
        f" from random images in {rows[random]['bytes']:,.0f} B, {of(chosen)} from images that a"
        f" teacher has chosen. Class names give {of('names')}. (Packs of {images} images a class;"
        " guidance 4, as measured for the smallest and kept for the others.)"
    )


METHODS = {
    "d3m": "`d3m`: prompts for `mini`",
    "classcond": "`classcond`: a DiT trained on CIFAR-10",
    "minimax": "`minimax`: that DiT, fine-tuned",
    "fine-tuned without": "the same without its two criteria",
}


def methods() -> str:
    """The three methods beside each other."""
    rows = load("methods")["rows"]
    lines = []
    for name, title in METHODS.items():
        row = rows[name]
        last, like = row["student"]["last"], row["likeness"]
        lines.append(
            f"| {title} | {row['bytes']:,} B | {row['backbone_bytes'] / 1e6:.1f} MB"
            f" | {100 * last['mean']:.1f} ± {100 * last['std']:.1f} %"
            f" | {like['precision']:.2f} / {like['recall']:.2f} / {like['coverage']:.2f}"
            f" | {row['speed']['images_per_second']:.0f} |"
        )
    images, threads = rows["d3m"]["images_per_class"], rows["d3m"]["speed"]["threads"]
    real = load("table-cifar10")["rows"]["random"]
    assert real["runs"][0]["images"] == 10 * images
    return (
        f"The three methods, {images} images a class each, students as above; precision, recall and"
        " coverage of each class's real images in a teacher's features (`d3m` alone picks its"
        " seeds, and by that teacher); images decoded a second on"
        f" {threads} cores that other work shared, so within a third. As many real photographs,"
        f" without loss, give {100 * real['last']['mean']:.1f} ±"
        f" {100 * real['last']['std']:.1f} %. A DiT serves this one data set and must travel with"
        " the pack; `mini` serves all.\n\n"
        "| method | pack | backbone | reads real CIFAR-10 | precision / recall / coverage"
        " | images/s |\n|---|---:|---:|---:|---:|---:|\n" + "\n".join(lines)
    )


def mini() -> str:
    """What the embedded backbone can do."""
    data = load("backbone")
    shares = [
        f"{100 * row['recognised_share']['top1']:.0f} % (top-1) and"
        f" {100 * row['recognised_share']['top5']:.0f} % (top-5) as often at guidance"
        f" {row['guidance']:g}"
        for row in data["by_guidance"]
    ]
    return (
        "`mini` itself: images made from bare class names are recognised by a classifier of 202"
        f" classes {', '.join(shares)} as real ones are; its autoencoder reaches"
        f" {data['autoencoder_psnr']:.1f} dB; all of it weighs"
        f" {data['weights_bytes'] / 1e6:.1f} MB."
    )


def learning() -> str:
    """What the prompts of a class cost beside textual inversion."""
    data = load("encode")
    worst, classes = data["worst"]["recipe"], data["classes"]
    ours = data["ours_all_classes"]["samples"] / len(classes)
    lower = sum("fewer_samples" not in c["best_moment"] for c in classes)
    reached = [c["recipe"] for c in classes]
    steps, accumulate = (data["peer_recipe"][name] for name in ("steps", "accumulate"))
    return (
        f"Learning a prompt: diffusers' textual inversion takes {steps:,} steps of {accumulate}"
        f" images a class, `encode` {ours:,.0f} samples,"
        f" {steps * accumulate / ours:.0f} times fewer. It is where the other ends, for each of"
        f" {len(classes)} classes of CIFAR-10, after {worst['fewer_samples']:.0f} to"
        f" {max(one['fewer_samples'] for one in reached):.0f} times fewer passes and in"
        f" {worst['less_time']:.0f} to {max(one['less_time'] for one in reached):.0f} times less"
        f" processor time; at its best moment on the way the other was lower in {lower} of them."
        " (Same backbone, same collages, examined on collages that no gradient has seen, by which"
        " `encode` also decides when to stop; choosing collages is not counted.)"
    )


def speed() -> str:
    """Decoding beside diffusers' pipelines, loading beside other formats."""
    decode, loader = load("decode")["speed"], load("loader")
    ours, dit = (decode["result"][kind] for kind in ("stable-diffusion", "dit"))
    pipeline = "exact_over_best_pipeline"
    alone, two = loader["second"]["workers_0"], loader["second"]["workers_2"]
    rates = {name: about(row["images_per_second"]) for name, row in alone.items()}
    most, passed = (
        about(two[name]["images_per_second"]) for name in ("tensor, DataLoader", "d3m DataLoader")
    )
    first = loader["first"]["ratio"]["loader"]["seconds"]
    return (
        f"On {decode['threads']} cores `mini` decodes"
        f" {ours['rates']['exact']['images_per_second']:.0f} images a second, exactly:"
        f" {ours[pipeline]['images_per_second']:.1f} times the rate of diffusers' own pipeline at"
        f" its best batch size ({dit[pipeline]['images_per_second']:.1f} times for a DiT). The"
        f" first epoch takes {first:.2f} of decoding everything and then training; from the second"
        f" on, `dataset.loader()` hands out {rates['d3m loader, disk']} images a second, where a"
        f" folder of JPEG files gives {rates['JPEG files']}, raw pixels in MDS"
        f" {rates['MDS, raw']}, in WebDataset {rates['WebDataset, raw']}, and a tensor in memory"
        f" {rates['tensor.index_select']} (no workers). PyTorch's DataLoader with two workers"
        f" passes on at most {most} from a plain tensor in memory, and {passed} from a pack."
    )


def sizes() -> str:
    """What a pack weighs."""
    data = load("format")["sizes"]
    f16, i4 = (data[f"1000_classes_{codec}"]["bytes"] for codec in ("f16", "i4"))
    return (
        "A pack of 1000 classes with one vector of 768 values each weighs"
        f" {f16:,} bytes in f16 and {i4:,} in i4, however many images it makes; picked seeds add"
        " three to six bits an image, soft labels what they weigh."
    )


def results() -> str:
    """The whole block."""
    body = "\n\n".join(
        (
            worth(),
            curve("cifar10", "CIFAR-10"),
            stranger(),
            methods(),
            mini(),
            learning(),
            speed(),
            sizes(),
        )
    )
    return f"<!-- results -->\n{body}\n<!-- /results -->"


if __name__ == "__main__":
    text = README.read_text("utf-8")
    README.write_text(BLOCK.sub(lambda _: results(), text), "utf-8")
