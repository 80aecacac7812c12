"""A second reader of .d3m files: standard library only, written from d3m-1.md, sharing nothing.
python spec/reader.py FILE prints what the pack holds as JSON, or the code of the refusal."""

# fmt: off
# ruff: noqa: E701, E731, N818, B905, SIM115, RUF007
import hashlib
import json
import math
import re
import struct
import sys

CODECS = {"classes": "utf8", "leaves": "sha256-128", "ids": "u32", "prompts": "f16 i8 i4 pq",
          "unconditional": "f16 i8 i4 pq", "codes": "noise", "picks": "lanes sets",
          "labels": "topk dense", "weights": "log", "adapter": "f16 i8", "probes": "u8"}
ORDER, SHARED = list(CODECS), ("classes", "leaves", "unconditional", "adapter", "probes")
DEFAULTS = {"optional": {}, "provenance": {}, "requires": [], "seed": "0" * 16}
RECIPE_DEFAULTS = {"dtype": "float32", "extra": {}, "grey": False, "group": 16, "guidance": 1.0,
                   "guided_channels": 0, "noise": "philox-normal16", "sampler": "dpmpp-2m",
                   "template": "a photo of a {}"}
BACKBONE_DEFAULTS = {"kind": "stable-diffusion", "licence": "unknown", "repo": ""}
FORMS = {"U8": "B", "I8": "b", "U32": "I", "F16": "e"}
FIELDS = "classes d3m images_per_class optional provenance recipe requires root sections seed"
RECIPE = " ".join(sorted([*RECIPE_DEFAULTS, "backbone", "sigmas", "size"]))
LINE = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]{0,1024}"
REPO = r"|[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"
HEX32, HEX64, FEATURE = "[0-9a-f]{32}", "[0-9a-f]{64}", "[a-z][a-z0-9-]{0,31}"
NAME = "[A-Za-z0-9_][A-Za-z0-9._-]{0,254}"
BAD_IN_NAME = "[\0-\t\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\udc80-\udcff]"

class Refused(Exception): code = property(lambda self: self.args[0])

def need(holds, code, why):
    if not holds: raise Refused(code, why)

def read(data):
    """Check every rule in the order of the specification; give the manifest, names and tensors."""
    need(len(data) >= 8, "E_TRUNCATED", "no header length")
    size = struct.unpack_from("<Q", data)[0]
    need(size <= 25_000_000, "E_LIMIT", "header length")
    need(8 + size <= len(data), "E_TRUNCATED", "header")
    raw, body = data[8 : 8 + size], data[8 + size :]
    need(raw[:1] == b"{" and raw.isascii(), "E_HEADER", "first byte, or not ASCII")
    need(sum(map(raw.count, (b",", b"[", b"{"))) <= 1_000_000, "E_LIMIT", "header values")
    meta = parse(raw.decode()).get("__metadata__")
    need(has(meta, "d3m") and isinstance(meta["d3m"], str), "E_HEADER", "__metadata__")
    need(meta["d3m"].isascii(), "E_JSON", "manifest is not ASCII")
    manifest = parse(meta["d3m"])
    m = check_manifest(manifest, meta["d3m"])
    C, sections = m["classes"], check_sections(m["sections"], m["optional"])
    shared, row = place(sections, C, m["images_per_class"])
    need(data[: 8 + size] == header(meta["d3m"], shared, C, row), "E_CANON", "header")
    over = len(body) - shared - C * row
    need(over == 0, "E_TRAILING" if over > 0 else "E_TRUNCATED", f"{over} bytes")
    for s in sections.values():
        need(not s["hash"] or digest(body[s["span"]])[:32] == s["hash"][0], "E_HASH", s["name"])
    rows = [body[at : at + row] for at in range(shared, len(body), row)]
    leaves = body[sections["leaves"]["span"]].hex()
    for c in range(C):
        need(digest(rows[c])[:32] == leaves[32 * c :][:32], "E_LEAF", f"class {c}")
    names, arrays = class_names(body[sections["classes"]["span"]], C), {}
    for t in (t for s in sections.values() for t in s["tensors"]):
        raw = b"".join(part[t["span"]] for part in ([body] if t["shared"] else rows))
        arrays[t["name"]] = struct.unpack(f"<{len(raw) // t['size']}{t['form']}", raw)
    check_values(sections, arrays, m)
    return {"manifest": manifest, "names": names, "arrays": arrays, "sections": sections}

def parse(text):
    def number(digits):  # also called for NaN and Infinity, which are no numbers here
        if not digits.lstrip("-").isdigit():
            need(math.isfinite(float(digits)), "E_JSON", "number")
            return float(digits)
        need(len(digits) <= 17 and abs(int(digits)) < 2**53, "E_JSON", "integer")
        return int(digits)
    def walk(value, depth):
        if isinstance(value, (dict, list)):
            need(depth < 32, "E_JSON", "nested too deep")
            for item in [*value, *value.values()] if isinstance(value, dict) else value:
                walk(item, depth + 1)
        elif isinstance(value, str):
            need(not re.search("[\ud800-\udfff]", value), "E_JSON", "surrogate")
    try:
        value = json.loads(text, parse_constant=number, parse_int=number, parse_float=number)
        walk(value, 0)
    except (ValueError, RecursionError) as error:
        raise Refused("E_JSON", str(error)) from None
    return value

digest = lambda data: hashlib.sha256(data).hexdigest()
canonical = lambda value: json.dumps(value, sort_keys=True, separators=(",", ":"))
sets = lambda p, count: math.comb(2 ** p["bits"], count)
widths = lambda p: [(sets(p, count) - 1).bit_length() + count for count in p["atoms"]]
real = lambda x, low, high: type(x) is float and low <= x <= high and canonical(x) != "-0.0"
whole = lambda value, low, high: type(value) is int and low <= value <= high
array = lambda value, low, high: isinstance(value, list) and low <= len(value) <= high
like = lambda pattern, value: isinstance(value, str) and re.fullmatch(pattern, value) is not None
table_ok = lambda rows, n: array(rows, n, n) and all(array(x, 2, 2) and array(x[1], 1, min(i, 4))
    and {*map(type, (x[0], *x[1]))} <= {int, float} for i, x in enumerate(rows, 1))
sigmas_ok = lambda s, most: (array(s, 2, most) and all(type(x) is float for x in s)
    and all(high >= low * (1 + 1e-6) for high, low in zip(s, s[1:]))
    and canonical(s[-1]) == "0.0" and s[0] <= 1e6 and s[-2] >= 1e-6)
code_defaults = lambda p: {"bits": 8, "eta": 1.0, "guidance": 1.0, "prompts": True, "images":
    p.get("codes"), "atoms": [1] * (len(p["sigmas"]) - 1 if type(p.get("sigmas")) is list else 0)}
rows_of = lambda v, n: [v[at : at + len(v) // n] for at in range(0, len(v), len(v) // n or 1)]
has = lambda value, names: isinstance(value, dict) and sorted(value) == names.split()

def check_manifest(m, text):
    need(isinstance(m, dict), "E_MANIFEST", "not an object")
    version, requires = m.get("d3m"), m.get("requires", [])
    need(array(version, 2, 2) and all(whole(x, 0, 2**31 - 1) for x in version), "E_MANIFEST", "d3m")
    need(version[0] == 1, "E_VERSION", f"version {version}")
    need(type(requires) is list and all(type(x) is str for x in requires), "E_MANIFEST", "requires")
    need(not requires, "E_FEATURE", str(requires))
    need(canonical(m) == text, "E_CANON", "manifest")
    full = filled(m, DEFAULTS)
    if isinstance(m.get("recipe"), dict):
        recipe = full["recipe"] = filled(m["recipe"], RECIPE_DEFAULTS)
        if isinstance(recipe.get("backbone"), dict):
            commit = {"revision": str(recipe["backbone"].get("lock"))[:40]}
            recipe["backbone"] = filled(recipe["backbone"], BACKBONE_DEFAULTS | commit)
    need(has(full, FIELDS) and like("[0-9a-f]{16}", full["seed"]), "E_MANIFEST", "fields, seed")
    fine = type(full["optional"]) is type(full["provenance"]) is dict
    need(fine and all(like(FEATURE, x) for x in full["optional"]), "E_MANIFEST", "optional")
    for name, most in (("classes", 2**20), ("images_per_class", 2**24)):
        need(type(m[name]) is int, "E_MANIFEST", name)
        need(1 <= m[name] <= most, "E_LIMIT", name)
    need(m["root"] == digest(canonical({x: m[x] for x in {*m} - {"root"}}).encode()), "E_ROOT", "")
    need(recipe_ok(full["recipe"]), "E_RECIPE", "recipe")
    need(m["classes"] * m["images_per_class"] <= 2**32, "E_LIMIT", "images")
    return full

def filled(value, defaults):
    for name in set(value) & set(defaults):
        need(canonical(value[name]) != canonical(defaults[name]), "E_CANON", f"default {name}")
    return {**defaults, **value}

def recipe_ok(r):
    need(has(r, RECIPE), "E_RECIPE", "fields")
    need(has(r["backbone"], "bytes kind licence lock repo revision"), "E_RECIPE", "backbone")
    b, x, sigmas, name, t = (r[y] for y in ("backbone", "extra", "sigmas", "sampler", "template"))
    return (like("[a-z0-9][a-z0-9._-]{0,63}", b["kind"]) and like(REPO, b["repo"])
        and like("[0-9a-f]{40}", b["revision"]) and like(LINE, b["licence"])
        and like(HEX64, b["lock"]) and whole(b["bytes"], 0, 2**48)
        and array(r["size"], 2, 2) and all(whole(side, 1, 8192) for side in r["size"])
        and like("ancestral|ddim|dpmpp-2m|euler|lcm|table", name) and type(x) is dict
        and r["dtype"] in ("float32", "bfloat16", "float16") and r["noise"] == "philox-normal16"
        and sigmas_ok(sigmas, 257 if name in ("ancestral", "lcm") else 1001)
        and (real(x.get("eta"), 0, 1e3) if name == "ancestral" else "eta" not in x)
        and (table_ok(x.get("table"), len(sigmas) - 1) if name == "table" else "table" not in x)
        and real(r["guidance"], -1e3, 1e3) and type(r["grey"]) is bool
        and whole(r["guided_channels"], 0, 1024) and whole(r["group"], 1, 1024)
        and (t is None or (like(LINE, t) and t.count("{}") <= 1)))

def check_sections(entries, optional):
    need(array(entries, 0, 64), "E_SECTION", "sections")
    for entry in entries:
        need(array(entry, 3, 4) and like(FEATURE, entry[0]), "E_SECTION", "entry")
        name, c, p, *h = entry
        need(name in ORDER or name in optional, "E_SECTION", "unknown")
        need(type(c) is str and type(p) is dict and all(like(HEX32, x) for x in h), "E_SECTION", "")
    names = [entry[0] for entry in entries]
    rank = [(ORDER.index(name) if name in ORDER else 99, name) for name in names]
    need(rank == sorted({*rank}) and {"classes", "leaves"} <= {*names}, "E_SECTION", "order")
    return {e[0]: {"name": e[0], "codec": e[1], "params": e[2], "hash": e[3:]} for e in entries}

def place(sections, C, n):
    at, seeded, vectors = {True: 0, False: 0}, n, []  # bytes shared, of a class; uncoded images
    for name, s in sections.items():
        start, s["tensors"] = at[True], []
        s["params"] = filled(s["params"], code_defaults(s["params"]) if name == "codes" else {})
        need(name not in CODECS or s["codec"] in CODECS[name].split(), "E_CODEC", s["codec"])
        rule = {"prompts": prompts, "unconditional": prompts, "codes": coded, "labels": labels,
                "adapter": adapter}
        s["n"], p = seeded if name == "picks" else n, s["params"]
        tensors = rule.get(name, other)(name, s["codec"], p, C, s["n"])
        vectors = vectors or p["shape"][1:] if rule.get(name) is prompts else vectors
        need(name != "unconditional" or p["shape"] == [1, *vectors], "E_CODEC", "shape")
        seeded -= p["images"] if name == "codes" else 0
        for tensor, (dtype, shape) in tensors.items():
            shared = name in SHARED or tensor in ("codebook", "shared")
            size = struct.calcsize(FORMS[dtype])
            stop = at[shared] + math.prod(shape) * size // (1 if shared else C)
            s["tensors"].append({"name": f"{name}.{tensor}", "dtype": dtype, "form": FORMS[dtype],
                                 "size": size, "shared": shared, "span": slice(at[shared], stop)})
            at[shared] = stop
        s["span"] = slice(start, at[True])
        need(len(s["hash"]) == (start < at[True]), "E_SECTION", f"hash of {name}")
        need(at[True] + C * at[False] <= 2**40, "E_LIMIT", "data")
    used = seeded > 0 or sections["codes"]["params"]["prompts"]
    need(("prompts" in sections) == used, "E_SECTION", "prompts")
    return at[True], at[False]

def header(text, shared, C, row):
    entry = '"%s":{"dtype":"U8","shape":%s,"data_offsets":%s}'
    parts = (f'{{"__metadata__":{{"d3m":{json.dumps(text)}}}',
             entry % ("shared", canonical([shared]), canonical([0, shared])),
             entry % ("rows", canonical([C, row]), canonical([shared, shared + C * row])))
    body = (",".join(parts) + "}").encode()
    size = (8 + len(body) + 7) // 8 * 8 - 8
    return struct.pack("<Q", size) + body.ljust(size)

def params(p, **ranges):
    need({*p} == {*ranges} and all(whole(p[k], *v) for k, v in ranges.items() if v), "E_CODEC", "")

def shape(p, *most):
    need(array(p["shape"], 3, 3) and all(map(whole, p["shape"], (1, 1, 1), most)), "E_CODEC", "")
    return p["shape"]

def prompts(name, codec, p, C, n):
    extra = {"i4": {"group": (1, 65536)}, "pq": {"dim": (1, 65536), "entries": (1, 256)}}
    params(p, shape=None, **extra.get(codec, {}))
    *front, width = [1 if name == "unconditional" else C, *shape(p, 4096, 1024, 65536)]
    step = p.get("group", p.get("dim", 1))
    parts, scales, book = -(-width // step), ["F16", front], ["F16", [p.get("entries"), step]]
    return {"f16": {"values": ["F16", [*front, width]]},
            "i8": {"codes": ["I8", [*front, width]], "scales": scales},
            "i4": {"codes": ["U8", [*front, -(-width // 2)]], "scales": ["F16", [*front, parts]]},
            "pq": {"codebook": book, "codes": ["U8", [*front, parts]], "scales": scales}}[codec]

def coded(name, codec, p, C, n):
    params(p, **dict.fromkeys([*code_defaults(p), "codes", "sigmas"]) | {"bits": (1, 16)})
    atoms, sigmas, most = p["atoms"], p["sigmas"], min(1024, 2 ** p["bits"])
    ok = (whole(p["images"], 1, n) and whole(p["codes"], 1, p["images"]) and sigmas_ok(sigmas, 257)
        and real(p["eta"], 0, 1e3) and real(p["guidance"], -1e3, 1e3) and type(p["prompts"]) is bool
        and (p["prompts"] or p["guidance"] == 1) and array(atoms, len(sigmas) - 1, len(sigmas) - 1)
        and all(whole(m, 0, most * (not i or p["eta"] > 0)) for i, m in enumerate(atoms)))
    need(ok and any(atoms), "E_CODEC", "codes")
    return {"bits": ["U8", [C, (p["codes"] * sum(widths(p)) + 7) // 8]]}

def labels(name, codec, p, C, n):
    params(p, **{"k": (1, C), "bits": (2, 12), "octaves": (1, 64)} if codec == "topk" else {})
    record = p.get("k", 0) * (max(1, (C - 1).bit_length()) + p.get("bits", 0))
    top = {"bits": ["U8", [C, (n * record + 7) // 8]]}
    return {"probs": ["F16", [C, n, C]]} if codec == "dense" else top

def adapter(name, codec, p, C, n):
    params(p, table=None)
    need(array(p["table"], 1, 16384), "E_ADAPTER", "table")
    for entry in p["table"]:
        need(array(entry, 2, 2) and like(NAME, entry[0]) and array(entry[1], 1, 6), "E_ADAPTER", "")
        need(all(whole(side, 1, 2**31 - 1) for side in entry[1]), "E_ADAPTER", "shape")
    need([e[0] for e in p["table"]] == sorted({e[0] for e in p["table"]}), "E_ADAPTER", "order")
    size = ["I8" if codec == "i8" else "F16", [sum(math.prod(shape) for _, shape in p["table"])]]
    rows = ["F16", [sum(shape[0] if len(shape) > 1 else 1 for _, shape in p["table"])]]
    return {"values": size} if codec == "f16" else {"codes": size, "scales": rows}

def other(name, codec, p, C, n):
    if name not in CODECS:  # of a newer minor version
        given = {k: p[q] for k, q in (("rows", "row"), ("shared", "shared")) if q in p}
        need(given and all(whole(size, 1, 2**40) for size in given.values()), "E_CODEC", "row")
        return {k: ["U8", [size] if k == "shared" else [C, size]] for k, size in given.items()}
    most, step, least, rows = (24, "stride", n, 1) if codec == "sets" else (16, "lanes", 1, n)
    params(p, **{"classes": {"bytes": (1, 2**40)}, "probes": {"shape": None},
                 "picks": {"bits": (1, most), step: (least, 2**31)}}.get(name, {}))
    need(p.get(step, 1) << p.get("bits", 1) <= 2**32 and n > 0, "E_CODEC", f"{step}, images")
    count, *sides = shape(p, 4096, 8192, 8192) if name == "probes" else [1]
    images, one = ["U8", [count, 3, *sides]], ["U32", [count]]
    return {"classes": {"text": ["U8", [p.get("bytes")]]}, "leaves": {"hash": ["U8", [C, 16]]},
            "ids": {"ids": ["U32", [C]]}, "weights": {"codes": ["U8", [C, n]]},
            "picks": {"codes": ["U8", [C, (rows * p.get("bits", 1) + 7) // 8]]},
            "probes": {"images": images, "labels": one, "indices": one}}[name]

def class_names(blob, count):
    names = blob.decode("utf-8", "surrogateescape").split("\n")  # bad bytes become surrogates
    fine = (not re.search(BAD_IN_NAME, x) and 1 <= len(x.encode()) <= 1024 for x in names)
    need(len(names) == count == len(set(names)) and all(fine), "E_NAME", "bytes, number or length")
    return names

def check_values(sections, arrays, m):
    C, n, ids = m["classes"], m["images_per_class"], arrays.get("ids.ids")
    need(ids is None or (len({*ids}) == C and ids != (*range(C),)), "E_IDS", "ids")
    for s in (sections[name] for name in ("prompts", "unconditional") if name in sections):
        finite(sections, arrays, s["name"], "E_PROMPT")
        codes, most = arrays.get(f"{s['name']}.codes", ()), s["params"].get("entries", 256)
        half, odd = divmod(s["params"]["shape"][2], 2)
        spare = codes[half :: half + 1] if s["codec"] == "i4" and odd else ()
        need(all(x < 16 for x in spare) and max(codes, default=0) < most, "E_PROMPT", "code")
    for row in rows_of(arrays.get("codes.bits", ()), C):
        q = sections["codes"]["params"]
        for code in records(bytes(row), q["codes"], widths(q), "E_CODES"):
            need(all(x >> m < sets(q, m) for x, m in zip(code, q["atoms"])), "E_CODES", "atoms")
    for row in rows_of(arrays.get("picks.codes", ()), C):
        q, count = sections["picks"]["params"], sections["picks"]["n"]
        xs = records(bytes(row), count if "lanes" in q else 1, [q["bits"]], "E_PICKS")
        need(len({(i % q.get("lanes", 1), *x) for i, x in enumerate(xs)}) == len(xs), "E_PICKS", "")
    for probs in rows_of(arrays.get("labels.probs", ()), C * n):
        need(all(math.copysign(1, x) > 0 and x < math.inf for x in probs), "E_LABEL", "value")
        need(abs(sum(probs) - 1) <= 2**-8, "E_LABEL", "mass")
    for row in rows_of(arrays.get("labels.bits", ()), C):
        topk_row(bytes(row), C, n, **sections["labels"]["params"])
    need({*arrays.get("weights.codes", ())} != {128}, "E_WEIGHTS", "all are 1")
    finite(sections, arrays, "adapter", "E_ADAPTER")
    pairs = list(zip(arrays.get("probes.labels", ()), arrays.get("probes.indices", ())))
    need(all(c < C and i < n for c, i in pairs) and len(set(pairs)) == len(pairs), "E_PROBE", "")

def finite(sections, arrays, section, code):
    for t in sections.get(section, {"tensors": []})["tensors"]:
        least = -127 if t["dtype"] == "I8" else -math.inf
        need(all(least <= x and math.isfinite(x) for x in arrays[t["name"]]), code, t["name"])

def records(blob, count, widths, code="E_LABEL"):
    stream, out = int.from_bytes(blob, "little"), []
    for width in widths * count:
        out.append(stream & ((1 << width) - 1))
        stream >>= width
    need(stream == 0, code, "spare bits")
    return [out[i : i + len(widths)] for i in range(0, len(out), len(widths))]

def topk_row(blob, C, n, k, bits, octaves):
    for fields in records(blob, n, k * [max(1, (C - 1).bit_length())] + k * [bits]):
        index, ranks, tail = fields[:k], [0, *fields[k:-1]], fields[-1]
        ordered = list(zip(ranks, index)) == sorted(zip(ranks, index))
        need(ordered and max(index) < C and len(set(index)) == k, "E_LABEL", "classes")
        need(tail == 2**bits - 1 if k == C else tail > 0, "E_LABEL", "tail")

if __name__ == "__main__":
    try: got = read(open(sys.argv[1], "rb").read())
    except Refused as error: sys.exit(": ".join(error.args))
    print(json.dumps({"names": got["names"], "manifest": got["manifest"]}, indent=1))
