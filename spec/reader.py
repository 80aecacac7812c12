"""A second reader of .d3m files: standard library only, written from d3m-1.md, sharing nothing.
python spec/reader.py FILE prints what the pack holds as JSON, or the code of the refusal."""

# fmt: off
# ruff: noqa: E731, N818, B905, SIM115, RUF007, UP031
import hashlib
import json
import math
import re
import struct
import sys

CODECS = {"classes": "utf8", "leaves": "sha256-128", "ids": "u32", "prompts": "f16 i8 i4 pq",
          "picks": "lanes", "labels": "topk dense", "adapter": "f16 i8", "probes": "u8"}
ORDER, SHARED = list(CODECS), ("classes", "leaves", "adapter", "probes")
FORMS = {"U8": "B", "I8": "b", "U16": "H", "U32": "I", "F16": "e", "F32": "f"}
FIELDS = "classes d3m images_per_class optional provenance recipe requires root sections seed"
RECIPE = "backbone dtype extra group guidance guided_channels noise sampler sigmas size template"
LINE = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{0,1024}"
PATH = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,254}(/[A-Za-z0-9_][A-Za-z0-9._+-]{0,254})*"
REPO = r"|[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"
HEX64, FEATURE, TENSOR = "[0-9a-f]{64}", "[a-z][a-z0-9-]{0,31}", "[a-z][a-z0-9_]{0,31}"
NAME = "[A-Za-z0-9_][A-Za-z0-9._-]{0,254}"
BAD_IN_NAME = "[\0-\t\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\udc80-\udcff]"

class Refused(Exception):
    """The bytes are no pack; `code` names the rule."""
    code = property(lambda self: self.args[0])

def need(holds, code, why):
    if not holds:
        raise Refused(code, why)

def read(data):
    """Check every rule in the order of the specification; give the manifest, names and tensors."""
    need(len(data) >= 8, "E_TRUNCATED", "no header length")
    size = struct.unpack_from("<Q", data)[0]
    need(size <= 25_000_000, "E_LIMIT", "header length")
    need(8 + size <= len(data), "E_TRUNCATED", "header")
    raw, body = data[8 : 8 + size], data[8 + size :]
    need(raw[:1] == b"{" and raw.isascii(), "E_HEADER", "first byte, or not ASCII")
    meta = parse(raw.decode()).get("__metadata__")
    need(has(meta, "d3m") and isinstance(meta["d3m"], str), "E_HEADER", "__metadata__")
    need(meta["d3m"].isascii(), "E_JSON", "manifest is not ASCII")
    manifest = parse(meta["d3m"])
    check_manifest(manifest, meta["d3m"])
    check_sections(manifest["sections"], manifest["optional"])
    slots, pads = place(manifest)
    check_forms(manifest["sections"], manifest["classes"], manifest["images_per_class"])
    need(data[: 8 + size] == header(meta["d3m"], slots + pads), "E_CANON", "header")
    over = len(body) - slots[-1]["stop"]
    need(over == 0, "E_TRAILING" if over > 0 else "E_TRUNCATED", f"{over} bytes")
    blobs = {slot["name"]: body[slot["start"] : slot["stop"]] for slot in slots}
    need(not any(any(body[pad["start"] : pad["stop"]]) for pad in pads), "E_PADDING", "padding")
    need(all(digest(blobs[s["name"]]) == s["sha256"] for s in slots), "E_HASH", "a tensor")
    for c in range(manifest["classes"]):
        rows = b"".join(row(blobs[s["name"]], s["shape"], c) for s in slots if s["axis"] == "class")
        need(digest(rows)[:32] == blobs["leaves.hash"][16 * c :][:16].hex(), "E_LEAF", f"class {c}")
    names = class_names(blobs["classes.text"], manifest["classes"])
    arrays = {s["name"]: struct.unpack("<%d" % s["n"] + s["form"], blobs[s["name"]]) for s in slots}
    check_values({s["name"]: s for s in manifest["sections"]}, arrays, manifest)
    return {"manifest": manifest, "names": names, "arrays": arrays}

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
whole = lambda value, low, high: type(value) is int and low <= value <= high
array = lambda value, low, high: isinstance(value, list) and low <= len(value) <= high
like = lambda pattern, value: isinstance(value, str) and re.fullmatch(pattern, value) is not None
row = lambda blob, shape, c: blob[len(blob) // shape[0] * c :][: len(blob) // shape[0]]
table_ok = lambda rows, n: array(rows, n, n) and all(array(x, 2, 2) and array(x[1], 1, min(i, 4))
    and {*map(type, (x[0], *x[1]))} <= {int, float} for i, x in enumerate(rows, 1))
has = lambda value, names: isinstance(value, dict) and sorted(value) == names.split()

def check_manifest(m, text):
    need(isinstance(m, dict), "E_MANIFEST", "not an object")
    version, requires = m.get("d3m"), m.get("requires")
    need(array(version, 2, 2) and all(whole(x, 0, 2**31 - 1) for x in version), "E_MANIFEST", "d3m")
    need(version[0] == 1, "E_VERSION", f"version {version}")
    need(type(requires) is list and all(type(x) is str for x in requires), "E_MANIFEST", "requires")
    need(not requires, "E_FEATURE", str(requires))
    need(canonical(m) == text, "E_CANON", "manifest")
    need(has(m, FIELDS) and like("[0-9a-f]{16}", m["seed"]), "E_MANIFEST", "fields, seed")
    need(type(m["optional"]) is type(m["provenance"]) is dict, "E_MANIFEST", "optional, provenance")
    need(all(like(FEATURE, x) for x in m["optional"]), "E_MANIFEST", "optional")
    for name, most in (("classes", 2**20), ("images_per_class", 2**24)):
        need(type(m[name]) is int, "E_MANIFEST", name)
        need(1 <= m[name] <= most, "E_LIMIT", name)
    rest = canonical({name: value for name, value in m.items() if name != "root"}).encode()
    need(m["root"] == digest(rest), "E_ROOT", "root")
    need(recipe_ok(m["recipe"]), "E_RECIPE", "recipe")

def recipe_ok(r):
    need(has(r, RECIPE), "E_RECIPE", "fields")
    need(has(r["backbone"], "files kind licence repo revision"), "E_RECIPE", "backbone")
    b, sigmas, files = r["backbone"], r["sigmas"], r["backbone"]["files"]
    locks = files.values() if isinstance(files, dict) else ()
    return (like("[a-z0-9][a-z0-9._-]{0,63}", b["kind"]) and like(REPO, b["repo"])
        and like("[0-9a-f]{40}", b["revision"]) and like(LINE, b["licence"])
        and 1 <= len(locks) <= 1024 and all(len(x) <= 1024 and like(PATH, x) for x in files)
        and not any(path[:at] in files for path in files for at, x in enumerate(path) if x == "/")
        and all(array(x, 2, 2) and whole(x[0], 0, 2**48) and like(HEX64, x[1]) for x in locks)
        and array(r["size"], 2, 2) and all(whole(side, 1, 8192) for side in r["size"])
        and like("ddim|dpmpp-2m|euler|lcm|table", r["sampler"]) and type(r["extra"]) is dict
        and r["dtype"] in ("float32", "bfloat16", "float16") and r["noise"] == "philox-normal16"
        and array(sigmas, 2, 1001) and all(type(x) is float for x in (*sigmas, r["guidance"]))
        and all(high >= low * (1 + 1e-6) for high, low in zip(sigmas, sigmas[1:]))
        and canonical(sigmas[-1]) == "0.0" and sigmas[0] <= 1e6 and sigmas[-2] >= 1e-6
        and (r["sampler"] != "lcm" or len(sigmas) <= 257) and -1000.0 <= r["guidance"] <= 1000.0
        and (r["sampler"] != "table" or table_ok(r["extra"].get("table"), len(sigmas) - 1))
        and whole(r["guided_channels"], 0, 1024) and whole(r["group"], 1, 1024)
        and like(LINE, r["template"]) and r["template"].count("{}") <= 1)

def check_sections(sections, optional):
    need(array(sections, 0, 64), "E_SECTION", "sections")
    for s in sections:
        need(has(s, "codec name params tensors") and like(FEATURE, s["name"]), "E_SECTION", "keys")
        need(s["name"] in ORDER or s["name"] in set(optional) - {"pad"}, "E_SECTION", "unknown")
        need(type(s["codec"]) is str and type(s["params"]) is dict, "E_SECTION", s["name"])
        need(array(s["tensors"], 1, 16), "E_SECTION", s["name"])
    names = [s["name"] for s in sections]
    rank = [(ORDER.index(name) if name in ORDER else 99, name) for name in names]
    need(rank == sorted(set(rank)), "E_SECTION", "order")
    need({"classes", "leaves", "prompts"} <= set(names), "E_SECTION", "missing")

def place(m):
    slots, pads, at = [], [], 0
    for section in m["sections"]:
        for entry in section["tensors"]:
            need(array(entry, 5, 5) and like(TENSOR, entry[0]), "E_SECTION", "entry")
            tensor, dtype, shape, axis, sha256 = entry
            name = f"{section['name']}.{tensor}"
            need(name not in [slot["name"] for slot in slots], "E_SECTION", "tensor twice")
            known = type(shape) is list and {*map(type, shape)} <= {int} and str(dtype) in FORMS
            need(known, "E_SHAPE", f"{name}: {dtype} {shape}")
            need(1 <= len(shape) <= 6 and all(1 <= x < 2**31 for x in shape), "E_LIMIT", name)
            need(axis == "shared" or [axis, shape[0]] == ["class", m["classes"]], "E_SHAPE", name)
            need(like(HEX64, sha256), "E_SECTION", name)
            start, n, form = (at + 63) // 64 * 64, math.prod(shape), FORMS[dtype]
            if start > at:
                pads.append({"name": f"pad.{len(pads)}", "dtype": "U8", "shape": [start - at],
                             "start": at, "stop": start})
            at = start + n * struct.calcsize(form)
            need(at <= 2**40, "E_LIMIT", "data")
            slots.append({"name": name, "dtype": dtype, "shape": shape, "axis": axis, "n": n,
                          "sha256": sha256, "form": form, "start": start, "stop": at})
    return slots, pads

def header(text, tensors):
    parts = [f'{{"__metadata__":{{"d3m":{json.dumps(text)}}}']
    for t in sorted(tensors, key=lambda tensor: tensor["start"]):
        shape, offsets = canonical(t["shape"]), f"[{t['start']},{t['stop']}]"
        entry = f'"dtype":"{t["dtype"]}","shape":{shape},"data_offsets":{offsets}'
        parts.append(f'"{t["name"]}":{{{entry}}}')
    body = (",".join(parts) + "}").encode()
    size = (8 + len(body) + 63) // 64 * 64 - 8
    return struct.pack("<Q", size) + body.ljust(size)

def check_forms(sections, C, n):
    need(C * n <= 2**32, "E_LIMIT", "images")
    for s in (s for s in sections if s["name"] in CODECS):
        name, codec, shapes = s["name"], s["codec"], {t[0]: t[2] for t in s["tensors"]}
        need(codec in CODECS[name].split(), "E_CODEC", f"{name}: {codec}")
        rule = {"prompts": prompts, "labels": labels, "adapter": adapter}.get(name, other)
        want = rule(name, codec, s["params"], shapes, C, n).items()
        right = [[k, *v, ("class", "shared")[name in SHARED or k == "codebook"]] for k, v in want]
        need([t[:4] for t in s["tensors"]] == right, "E_SHAPE", f"{name}: must be {right}")

def params(p, ranges, figures):
    need(set(p) == {*ranges, *figures}, "E_CODEC", "params")
    need(all(whole(p[key], *limits) for key, limits in ranges.items() if limits), "E_CODEC", "")
    for key, parts in figures.items():
        fine = has(p[key], parts) and all(type(x) is float for x in p[key].values())
        need(fine and all(0.0 <= x <= 1e30 for x in p[key].values()), "E_CODEC", key)

def prompts(name, codec, p, shapes, C, n):
    extra = {"i4": ["group"], "pq": ["dim"]}.get(codec, [])
    params(p, {"shape": None} | dict.fromkeys(extra, (1, 65536)), {"error": "rms worst"})
    fine = array(p["shape"], 3, 3) and all(map(whole, p["shape"], (1, 1, 1), (4096, 1024, 65536)))
    step, entries = p[extra[0]] if extra else 1, shapes.get("codebook", [1])[0]
    need(fine and entries <= 256, "E_CODEC", "shape or codebook")
    *front, width = [C, *p["shape"]]
    parts, scales = -(-width // step), ["F16", front]
    book, codes = ["F16", [entries, step]], ["U8", [*front, parts]]
    return {"f16": {"values": ["F16", [*front, width]]},
            "i8": {"codes": ["I8", [*front, width]], "scales": scales},
            "i4": {"codes": ["U8", [*front, -(-width // 2)]], "scales": ["F16", [*front, parts]]},
            "pq": {"codebook": book, "codes": codes, "scales": scales}}[codec]

def labels(name, codec, p, shapes, C, n):
    figures = {"error": "max mean"} | ({"kept": "mean min"} if codec == "topk" else {})
    figures |= {"restricted": "empty mean min"} if "restricted" in p else {}
    ranges = {"classes": (C, C), "images": (n, n)}
    ranges |= {"k": (1, C), "bits": (2, 12), "octaves": (1, 64)} if codec == "topk" else {}
    params(p, ranges, figures)
    record = p.get("k", 0) * (max(1, (C - 1).bit_length()) + p.get("bits", 0))
    top = {"bits": ["U8", [C, (n * record + 7) // 8]]}
    return {"probs": ["F16", [C, n, C]]} if codec == "dense" else top

def adapter(name, codec, p, shapes, C, n):
    params(p, {"table": None}, {"error": "rms"})
    need(array(p["table"], 1, 16384), "E_ADAPTER", "table")
    for entry in p["table"]:
        need(array(entry, 2, 2) and like(NAME, entry[0]) and array(entry[1], 1, 6), "E_ADAPTER", "")
        need(all(whole(side, 1, 2**31 - 1) for side in entry[1]), "E_ADAPTER", "shape")
    need([e[0] for e in p["table"]] == sorted({e[0] for e in p["table"]}), "E_ADAPTER", "order")
    size = ["I8" if codec == "i8" else "F16", [sum(math.prod(shape) for _, shape in p["table"])]]
    rows = ["F16", [sum(shape[0] if len(shape) > 1 else 1 for _, shape in p["table"])]]
    return {"values": size} if codec == "f16" else {"codes": size, "scales": rows}

def other(name, codec, p, shapes, C, n):
    ranges = {"bits": (1, 16), "images": (n, n), "lanes": (1, 2**31)}
    params(p, ranges if name == "picks" else {}, {})
    need(p.get("lanes", 1) << p.get("bits", 1) <= 2**32, "E_CODEC", "lanes")
    picks = ["U8", [C, (n * p.get("bits", 1) + 7) // 8]]
    image, text = shapes.get("images", [1]), [math.prod(shapes.get("text", [0]))]
    need(name != "probes" or len(image) == 4, "E_SHAPE", "probes")
    need(name != "probes" or image[0] <= 4096, "E_LIMIT", "probes")
    images, one = ["U8", [image[0], 3, *image[2:]]], ["U32", image[:1]]
    return {"classes": {"text": ["U8", text]}, "leaves": {"hash": ["U8", [C, 16]]},
            "ids": {"ids": ["U32", [C]]}, "picks": {"codes": picks},
            "probes": {"images": images, "labels": one, "indices": one}}[name]

def class_names(blob, count):
    names = blob.decode("utf-8", "surrogateescape").split("\n")  # bad bytes become surrogates
    fine = (not re.search(BAD_IN_NAME, x) and 1 <= len(x.encode()) <= 1024 for x in names)
    need(len(names) == count == len(set(names)) and all(fine), "E_NAME", "bytes, number or length")
    return names

def check_values(sections, arrays, m):
    C, n, p = m["classes"], m["images_per_class"], sections["prompts"]["params"]
    ids = list(arrays.get("ids.ids", range(1, C + 1)))
    need(len(set(ids)) == C and ids != list(range(C)), "E_IDS", "ids")
    finite(sections, arrays, "prompts", "E_PROMPT")
    codec, codes = sections["prompts"]["codec"], arrays.get("prompts.codes", ())
    half, odd = divmod(p["shape"][2], 2)
    spare = codes[half :: half + 1] if codec == "i4" and odd else ()
    need(not any(byte >> 4 for byte in spare), "E_PROMPT", "spare nibble")
    need(codec != "pq" or max(codes) < len(arrays["prompts.codebook"]) // p["dim"], "E_PROMPT", "")
    for c in range(C if "picks.codes" in arrays else 0):
        q, blob = sections["picks"]["params"], row(bytes(arrays["picks.codes"]), [C], c)
        codes = records(blob, n, [q["bits"]], "E_PICKS")
        need(len({(i % q["lanes"], *x) for i, x in enumerate(codes)}) == n, "E_PICKS", "twice")
    dense = arrays.get("labels.probs", ())
    for probs in (dense[i : i + C] for i in range(0, len(dense), C)):
        need(all(math.copysign(1, x) > 0 and x < math.inf for x in probs), "E_LABEL", "value")
        need(abs(sum(probs) - 1) <= 2**-8, "E_LABEL", "mass")
    for c in range(C if "labels.bits" in arrays else 0):
        topk_row(row(bytes(arrays["labels.bits"]), [C], c), sections["labels"]["params"])
    finite(sections, arrays, "adapter", "E_ADAPTER")
    pairs = list(zip(arrays.get("probes.labels", ()), arrays.get("probes.indices", ())))
    need(all(c < C and i < n for c, i in pairs) and len(set(pairs)) == len(pairs), "E_PROBE", "")

def finite(sections, arrays, section, code):
    for tensor, dtype, *_ in sections.get(section, {"tensors": []})["tensors"]:
        values, least = arrays[f"{section}.{tensor}"], -127 if dtype == "I8" else -math.inf
        need(all(least <= x and math.isfinite(x) for x in values), code, tensor)

def records(blob, count, widths, code="E_LABEL"):
    stream, out = int.from_bytes(blob, "little"), []
    for width in widths * count:
        out.append(stream & ((1 << width) - 1))
        stream >>= width
    need(stream == 0, code, "spare bits")
    return [out[i : i + len(widths)] for i in range(0, len(out), len(widths))]

def topk_row(blob, p):
    C, k, bits = p["classes"], p["k"], p["bits"]
    for fields in records(blob, p["images"], k * [max(1, (C - 1).bit_length())] + k * [bits]):
        index, ranks, tail = fields[:k], [0, *fields[k:-1]], fields[-1]
        ordered = list(zip(ranks, index)) == sorted(zip(ranks, index))
        need(ordered and max(index) < C and len(set(index)) == k, "E_LABEL", "classes")
        need(tail == 2**bits - 1 if k == C else tail > 0, "E_LABEL", "tail")

if __name__ == "__main__":
    try:
        got = read(open(sys.argv[1], "rb").read())
    except Refused as error:
        sys.exit(": ".join(error.args))
    print(json.dumps({"names": got["names"], "manifest": got["manifest"]}, indent=1))
