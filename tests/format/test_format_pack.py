"""Pack: immutable, selectable, accountable."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from format_packs import RECIPE, full, make, stored

import d3pack
from d3pack.decode import noise
from d3pack.errors import UsageError
from d3pack.format.codecs import (
    decode_labels,
    decode_picks,
    decode_prompts,
    encode_labels,
    encode_unconditional,
)
from d3pack.format.coded import Coded
from d3pack.format.recipe import BackboneRef, FileLock, Recipe, files_json, lock_of, parse_files
from d3pack.testing import raises_code


def test_pack_is_immutable() -> None:
    pack = full(provenance={"a": {"b": [1]}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        pack.seed = 1  # type: ignore[misc]
    assert pack.probes is not None
    assert pack.picks is not None
    assert pack.prompts is not None
    arrays = [pack.probes.images, *pack.picks.tensors.values(), *pack.prompts.tensors.values()]
    again = d3pack.read(d3pack.pack_bytes(pack)).prompts
    assert again is not None
    arrays += list(again.tensors.values())
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    for mapping in (pack.provenance, pack.provenance["a"], pack.prompts.params, pack.manifest):
        with pytest.raises(TypeError):
            mapping["x"] = 1  # type: ignore[index]
        with pytest.raises(TypeError):
            mapping.update(x=1)  # type: ignore[union-attr]
    assert isinstance(pack.provenance["a"]["b"], tuple)


def test_pack_copies_the_callers_arrays() -> None:
    ids = np.arange(5, dtype=np.uint32) + 5
    view = ids.view()
    view.flags.writeable = False  # the owner can still write through `ids`
    codes = np.tile(np.arange(6, dtype=np.uint8), (5, 1))
    picks = Coded("lanes", {"codes": codes}, {"bits": 8, "images": 6, "lanes": 1})
    pack = make(ids=view, picks=picks)
    root = pack.root
    ids[:], codes[:] = 2, 9
    assert pack.ids is not None
    assert pack.picks is not None
    assert pack.ids.max() == 9
    assert decode_picks(pack.picks).max() == 5
    assert pack.root == root
    assert ids.flags.writeable


def test_equal_packs_have_equal_hash_pickle_and_copy() -> None:
    pack = full()
    same = d3pack.read(d3pack.pack_bytes(pack))
    assert pack == same
    assert hash(pack) == hash(same)
    assert pack != replace(pack, seed=78)
    assert pack != "pack"
    for other in (pickle.loads(pickle.dumps(pack)), copy.deepcopy(pack)):
        assert other == pack
        assert not stored(other.picks).tensors["codes"].flags.writeable
    assert len(pack) == 30


def images(pack: Any, c: int, i: int) -> Any:
    """What the pixels are a function of: noise, prompt of the mode, recipe."""
    classes, columns = pack.counters([c], [i])
    vectors = decode_prompts(pack.prompts)[c]
    mode = i % vectors.shape[0]
    return noise.normal(pack.seed, classes, columns, (4, 2, 2)), vectors[mode]


@pytest.mark.parametrize("picks", [None, True])
def test_selection_keeps_its_images(picks: Any) -> None:
    pack = full() if picks else make(labels=True)
    part = pack.select([3, "class 0"])
    assert part.classes == ("class 3", "class 0")
    for new, old in ((0, 3), (1, 0)):
        for i in range(6):
            for got, want in zip(images(part, new, i), images(pack, old, i), strict=True):
                assert (got == want).all()
    again = part.select(["class 3"])
    assert again.counters([0], [0])[0].tolist() == [3]
    back = pack.select([0, 1])
    assert back.ids is None, "ids that say nothing are left out"
    assert d3pack.read(d3pack.pack_bytes(again)) == again


def test_labels_of_a_selection_are_renormalised() -> None:
    pack = full()
    rows = [4, 1, 2]
    part = pack.select(rows)
    for new, old in enumerate(rows):
        kept = decode_labels(stored(pack.labels), old)[:, rows]
        want = kept / kept.sum(axis=1, keepdims=True)
        got = decode_labels(stored(part.labels), new)
        assert got.shape == (6, 3)
        assert np.abs(got - want).max() < 0.02
        assert np.abs(got.sum(axis=1) - 1).max() < 1e-6
    figures = stored(part.labels).figures["restricted"]
    assert 0 < figures["min"] <= figures["mean"] <= 1
    alone = pack.select([2]).labels
    assert (decode_labels(stored(alone), 0) == 1).all()


def test_image_without_mass_in_a_selection_gets_its_own_class() -> None:
    probs = np.zeros((3, 1, 3))
    probs[:, :, 2] = 1.0
    from d3pack.format.codecs import encode_labels

    pack = make(3, 1, labels=encode_labels(probs, "dense"))
    part = pack.select([1, 0])
    assert decode_labels(stored(part.labels)).tolist() == [[[1.0, 0.0]], [[0.0, 1.0]]]
    assert stored(part.labels).figures["restricted"] == {"mean": 0.0, "min": 0.0, "empty": 1.0}


def test_first_keeps_the_first_images() -> None:
    pack = full()
    part = pack.first(2)
    assert len(part) == 10
    assert (decode_picks(stored(part.picks)) == decode_picks(stored(pack.picks))[:, :2]).all()
    assert (decode_labels(stored(part.labels)) == decode_labels(stored(pack.labels))[:, :2]).all()
    assert part.probes is not None
    assert part.probes.indices.max() < 2
    assert d3pack.read(d3pack.pack_bytes(part)) == part
    assert pack.first(6) is pack
    assert pack.first(1).first(1) == pack.first(1)
    probs = np.full((3, 6, 3), 1 / 3)
    dense = make(3, labels=encode_labels(probs, "dense")).first(2)
    assert stored(dense.labels).tensors["probs"].shape == (3, 2, 3)
    assert d3pack.read(d3pack.pack_bytes(dense)) == dense


def test_part_records_its_origin() -> None:
    pack = full()
    part = pack.select([1, 2]).first(3)
    steps = part.provenance["derived"]
    assert [sorted(step) for step in steps] == [["from", "select"], ["first", "from"]]
    assert steps[0]["from"] == pack.root
    assert steps[1]["from"] == pack.select([1, 2]).root
    assert pack.select(range(5)) is pack


def test_parts_keep_the_vectors_of_no_class() -> None:
    none = encode_unconditional(np.ones((3, 40), np.float32))
    pack = make(unconditional=none, recipe=replace(RECIPE, template=None))
    for part in (pack.select([2]), pack.first(1), d3pack.read(d3pack.pack_bytes(pack))):
        assert part.recipe.template is None
        assert part.unconditional is not None
        assert np.allclose(decode_prompts(part.unconditional), 1, atol=1e-3)
    assert pack.ledger().sections["unconditional"] == 3 * 40 + 3 * 2
    with raises_code("E_CODEC", match="not that of a prompt"):
        make(unconditional=encode_unconditional(np.ones((2, 40), np.float32))).placement()


def test_probes_follow_their_images() -> None:
    pack = full()
    part = pack.select([2, 0])
    assert part.probes is not None
    assert pack.probes is not None
    assert part.probes.labels.tolist() == [1, 0]
    assert (part.probes.images == pack.probes.images[[0, 2]]).all()
    assert pack.select([4]).probes is None


def test_invalid_selections_are_refused() -> None:
    pack = make()
    for wrong in ([], [0, 0], [5], [-1], ["nobody"], [0, "class 0"]):
        with pytest.raises(UsageError):
            pack.select(wrong)  # type: ignore[arg-type]
    for k in (0, 7, -1):
        with pytest.raises(UsageError):
            pack.first(k)


@pytest.mark.parametrize("classes", ["class 0", 3, None, b"x"])
def test_selection_that_is_no_list_is_refused(classes: Any) -> None:
    with pytest.raises(UsageError, match="expected a list"):
        make().select(classes)


@pytest.mark.parametrize("k", ["1", 1.0, True, None])
def test_number_of_images_that_is_no_integer_is_refused(k: Any) -> None:
    with pytest.raises(UsageError, match="is not a number of images"):
        make().first(k)


def test_ledger_adds_up_to_the_file() -> None:
    for pack in (make(), full(provenance={"teacher": {"bytes": 1000}}), full().select([1])):
        ledger = pack.ledger()
        assert ledger.total == len(d3pack.pack_bytes(pack))
        assert ledger.per_class == ledger.total / len(pack.classes)
        assert ledger.per_image == ledger.total / len(pack)
        assert ledger.backbone == 12
        assert all(nbytes >= 0 for nbytes in ledger.sections.values())
    ledger = full(provenance={"teacher": {"bytes": 1000}}).ledger()
    assert ledger.teacher == 1000
    assert ledger.everything == ledger.total + 12 + 1000
    assert ledger.sections["picks"] == 30
    assert ledger.sections["prompts"] == 5 * 2 * 3 * 40 * 2
    assert make().ledger().teacher is None


def test_recipe_survives_json() -> None:
    recipe = replace(RECIPE, extra={"rows": [1, [2.5]]}, guidance=3, sigmas=(5, 1, 0))
    assert recipe.sigmas == (5.0, 1.0, 0.0)
    assert type(recipe.guidance) is float
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe(recipe.backbone, (8, 8), "ddim", np.float32([2, 0.5, 0])).sigmas == (  # type: ignore
        2.0,
        0.5,
        0.0,
    )
    value = recipe.to_json()
    value["backbone"]["magic"] = 1
    with raises_code("E_RECIPE", match=r"recipe\.backbone\.magic: unknown field"):
        Recipe.from_json(value)
    del value["backbone"]["magic"], value["size"]
    with raises_code("E_RECIPE", match=r"recipe\.size: missing"):
        Recipe.from_json(value)
    with raises_code("E_RECIPE", match=r"revision: 'main' is not 40 hex digits"):
        BackboneRef("dit", "a/b", "main", {"x": FileLock(1, "0" * 64)}).check()


def test_lock_depends_on_files_but_not_their_order() -> None:
    files = {"a.json": FileLock(1, "0" * 64), "b/c.json": FileLock(2, "1" * 64)}
    lock = lock_of(files)
    text = f'{{"a.json":[1,"{"0" * 64}"],"b/c.json":[2,"{"1" * 64}"]}}'
    assert lock == hashlib.sha256(text.encode()).hexdigest()
    assert lock_of(dict(reversed(files.items()))) == lock
    assert lock_of({**files, "a.json": FileLock(2, "0" * 64)}) != lock
    ref = BackboneRef("dit", "", files=files)
    assert (ref.lock, ref.revision, ref.nbytes) == (lock, lock[:40], 3)
    read = BackboneRef.from_json(ref.to_json())
    assert (read, dict(read.files)) == (ref, {})
    assert parse_files(files_json(files)) == files


LOCK = [5, "5a" * 32]


@pytest.mark.parametrize(
    "files",
    [
        {},
        [],
        {"../x.json": LOCK},
        {"/x.json": LOCK},
        {"a\\x.json": LOCK},
        {"a/.x": LOCK},
        {"a": LOCK, "a/b.json": LOCK},
        {"a/" + "x" * 256: LOCK},
        {"/".join(["x" * 255] * 5): LOCK},
        {"a//x": LOCK},
        {"": LOCK},
        {"x": [5, "5" * 63]},
        {"x": [-1, "5a" * 32]},
        {"x": [2**48 + 1, "5a" * 32]},
        {"x": [True, "5a" * 32]},
        {"x": [1, "5a" * 32, 2]},
        {"x": "5a" * 32},
        {f"f{i}": LOCK for i in range(1025)},
    ],
    ids=lambda files: str(files)[:40],
)
def test_invalid_lists_of_files_are_refused(files: Any) -> None:
    with raises_code("E_RECIPE"):
        parse_files(files)
    assert parse_files({"/".join(["x" * 255] * 4): LOCK, "y": [0, "ab" * 32]})


@pytest.mark.parametrize("wanted", [[1.9], [True], [None], [1.0]])
def test_class_must_be_a_name_or_an_integer(wanted: Any) -> None:
    with pytest.raises(UsageError):
        make().select(wanted)


@pytest.mark.parametrize("k", [2.5, True, None, "2"])
def test_number_of_images_must_be_an_integer(k: Any) -> None:
    with pytest.raises(UsageError):
        make().first(k)
    assert make().first(np.int64(2)).images_per_class == 2  # type: ignore[arg-type]


def test_ledger_adds_up_with_newer_sections_of_any_name() -> None:
    for name in ("recipe", "provenance", "optional", "container"):
        extra = {name: Coded("odd", {"rows": np.zeros((5, 100), np.uint8)})}
        pack = make(optional={name: {}}, extensions=extra)
        assert pack.ledger().total == len(d3pack.pack_bytes(pack))
        assert d3pack.read(d3pack.pack_bytes(pack)) == pack


def test_ledger_ignores_a_negative_size_of_a_teacher() -> None:
    ledger = make(provenance={"teacher": {"bytes": -(10**9)}}).ledger()
    assert ledger.teacher is None
    assert ledger.everything == ledger.total + ledger.backbone


def test_owner_of_an_array_cannot_change_a_pack() -> None:
    values = np.arange(30, dtype=np.uint8).reshape(5, 6)
    values.flags.writeable = False
    coded = Coded("odd", {"t": values})
    values.flags.writeable = True
    values[:] = 9
    assert coded.tensors["t"].ravel().tolist() == list(range(30))
    with pytest.raises(ValueError, match="WRITEABLE"):
        coded.tensors["t"].flags.writeable = True


def test_labels_cut_twice_record_the_larger_error() -> None:
    rng = np.random.default_rng(3)
    labels = encode_labels(rng.dirichlet(np.full(8, 0.4), (8, 6)), k=3, bits=3)
    once = make(8, labels=labels).select([0, 1, 2])
    twice = once.select([0, 1])
    for figure in ("mean", "max"):
        first, second = (stored(p.labels).figures["error"][figure] for p in (once, twice))
        assert labels.figures["error"][figure] <= first <= second


def test_negative_zeros_in_labels_are_stored_as_zeros() -> None:
    probs = np.array([[[1.0, -0.0]] * 6, [[-0.0, 1.0]] * 6])
    pack = make(2, labels=encode_labels(probs, "dense"))
    assert d3pack.read(d3pack.pack_bytes(pack)) == pack
