"""What was found beside what is wanted, and what bounds it: found -> [{what, measured, limit, met, bound}]. Used by gpu.py.

Arithmetic only: no kernel runs here. An entry without a limit says how far something is from what bounds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from bounds import BEATEN, NEAR, explained
from gpu_floors import step_operations, token_bytes
from gpu_kernels import TOLERANCE
from gpu_linears import DX, MANY
from limits import Found, entry

WORDS = {
    "ours": "qlora-compile",
    "ours_without_logits": "qlora-compile, keep_logits=False",
    "dense_lora": "dense bf16 LoRA (PEFT, fp32 adapters)",
    "bitsandbytes": "bitsandbytes NF4 + PEFT (fp32 adapters, its default)",
    "bitsandbytes_bf16": "bitsandbytes NF4 + PEFT (adapters cast to bf16)",
}
TRAINING_LIMITS = {"dense_lora": 1.10, "bitsandbytes": 0.80, "bitsandbytes_bf16": None}
BUSY = 0.9  # of a step: a device that works less waits for the host
FEW = 64  # rows of x up to which weights' bytes are the bound


def summary(found: Found) -> list[Found]:
    """All entries that what was found so far allows."""
    parts = (checks, dequantize, few_rows, one_token, many_rows, training, decoding, paging, paged_steps)
    return [entry for part in parts for entry in part(found)]


def _of(share: float, bound: str) -> str:
    """What a share is a share of."""
    return f"part of {bound}" if share <= BEATEN else f"times {bound}, which is none if it can be beaten"


def _beside(floor_s: float, time_s: float) -> str:
    """A floor beside the time."""
    share = floor_s / time_s
    return f"{1e3 * floor_s:.4g} ms" + (f", {share:.2f} of it" if share <= BEATEN else ": beaten, so no bound")


def checks(found: Found) -> Iterator[Found]:
    if "checks" in found:
        count, wrong = found["checks"]["compared"], len(found.get("wrong", []))
        said = f"{count} comparisons, {wrong} wrong or failed"
        one = entry("kernels against fp64, largest error", found["checks"]["largest_error"], said, at_most=TOLERANCE)
        yield one | {"met": one["met"] and not wrong}


def dequantize(found: Found) -> Iterator[Found]:
    for row in found.get("dequantize", []):
        share = row["of_copy_bandwidth"]
        said = f"{row['bytes'] / row['ours_us'] / 1e3:,.0f} GB/s; {explained(row['bound'])}"
        name = f"dequantize {row['n']}x{row['k']}"
        yield entry(f"{name}, {_of(share, 'the bandwidth of a copy')}", share, said, at_least=0.85)
        if "bitsandbytes_us" in row:
            yield entry(f"{name} / bitsandbytes'", row["ours_us"] / row["bitsandbytes_us"], "")


def few_rows(found: Found) -> Iterator[Found]:
    """Few rows of x: what part of its time the bytes explain."""
    for row in found.get("linear", []):
        if row["op"] != "lora_linear" or row["m"] > FEW or "bound" not in row:
            continue
        share = row["bound"]["bytes_us"] / row["us"][row["best"]]
        what = f"linear M={row['m']} N={row['n']} K={row['k']} ({row['best']})"
        what += f", {_of(share, 'its bound by bandwidth')}"
        yield entry(what, share, _bound(row, found), at_least=0.70 if row["m"] == 1 else None)


def one_token(found: Found) -> Iterator[Found]:
    """A linear among others, on weights that no cache holds, beside a graph of it alone."""
    for row in found.get("chained", []):
        ours = {name: us for name, us in row["us"].items() if name != "dense_bf16"}
        if not ours:
            continue
        best, said = min(ours, key=ours.__getitem__), []
        if "dense_bf16" in row["us"]:
            said.append(f"dense bf16 {row['us']['dense_bf16']:.1f}")
        for single in found.get("linear", []):
            if single["op"] == "lora_linear" and all(single[key] == row[key] for key in "mnk") and "bound" in single:
                said.append(f"alone in a graph {single['us'].get(best, math.nan):.1f}")
                said.append(f"its bytes {single['bound']['bytes_us']:.1f}")
        what = f"linear M=1 N={row['n']} K={row['k']} ({best}), one of {row['count']} one after the other, us"
        yield entry(what, ours[best], ", ".join(said))


def many_rows(found: Found) -> Iterator[Found]:
    """y and dX of many rows beside the library's two products with the dense weight."""
    rows = [row for row in found.get("linear", []) if row["m"] >= MANY and row["best"] is not None]
    for dx in (row for row in rows if row["op"] == DX):
        for forward in rows:
            if forward["op"] == "lora_linear" and all(forward[key] == dx[key] for key in "mnk"):
                ours = sum(row["us"][row["best"]] for row in (forward, dx))
                dense = forward["dense_bf16_us"] + dx["dense_bf16_us"]
                said = f"y: {_bound(forward, found)}; dX: {_bound(dx, found)}"
                what = f"y and dX, M={dx['m']} N={dx['n']} K={dx['k']}: part of the library's bf16 speed"
                yield entry(what, dense / ours, said, at_least=0.90)


def _bound(row: Found, found: Found) -> str:
    """A row's bound in words; of launches, what they are known to take."""
    if "bound" not in row:
        return ""
    said = explained(row["bound"])
    if "launch" in found and (row["m"] <= FEW or row["bound"]["share"] < NEAR):
        said += " (a graph of one tiny kernel takes {one_us:.1f} us, each more {next_us:.1f})".format(**found["launch"])
    return said


def training(found: Found) -> Iterator[Found]:
    """Each contender's step and what bounds it; ours beside the others."""
    steps: Found = found.get("model", {}).get("training", {})
    for name, result in steps.items():
        parts = [_host_or_device(result)]
        if "speeds" in found:
            work = step_operations(found["model"]["shape"], found["model"]["layers"], found["settings"]["tokens"])
            floor = work / found["speeds"]["operations"]
            parts.append(f"its {work / 1e12:.3g} Tflop alone {_beside(floor, result['step_s'])}")
        if "peak_mb" in result:
            parts.append("peak {peak_mb:,.0f} MB ({peak_with_compiling_mb:,.0f} with compiling)".format(**result))
        yield entry(f"training step of {WORDS[name]}, ms", 1e3 * result["step_s"], "; ".join(filter(None, parts)))
    for mine in ("ours", "ours_without_logits"):
        for name, limit in TRAINING_LIMITS.items():
            if mine in steps and name in steps:
                what = f"training step of {WORDS[mine]} / {WORDS[name]}"
                ratio, limit = steps[mine]["step_s"] / steps[name]["step_s"], limit if mine == "ours" else None
                yield entry(what, ratio, _host_or_device(steps[mine]), at_most=limit)
                if "profile" in steps[mine] and "profile" in steps[name]:
                    works = [steps[one]["profile"]["device_ms"] for one in (mine, name)]
                    said = "{:.4g} and {:.4g} ms".format(*works)
                    yield entry(f"{what}, what the device works", works[0] / works[1], said)


def _host_or_device(result: Found) -> str:
    """What of a step the device works; empty where no step was profiled."""
    if "profile" not in result:
        return ""
    profile, step_ms = result["profile"], 1e3 * result["step_s"]
    bound = "host" if profile["device_ms"] < BUSY * step_ms else "device"
    works = f"the device works {profile['device_ms']:.4g} of {step_ms:.4g} ms, {profile['launches']} launches"
    return f"bound by the {bound}: {works}"


def decoding(found: Found) -> Iterator[Found]:
    tokens: Found = found.get("model", {}).get("decoding", {})
    for name, result in tokens.items():
        said = ""
        if "speeds" in found:
            read = token_bytes(name, found["model"]["shape"], found["model"]["layers"])
            floor = read / found["speeds"]["read"]
            said = f"its {read / 1e6:,.0f} MB of weights alone {_beside(floor, result['token_s'])}"
            if floor < NEAR * result["token_s"] and "launch" in found:
                said += f"; bound by Python and launches (each {found['launch']['host_us']:.1f} us of the host)"
        yield entry(f"decoding with {WORDS[name]}, ms a token", 1e3 * result["token_s"], said)
    for name in tokens:
        if name != "ours" and "ours" in tokens:
            ratio = tokens["ours"]["token_s"] / tokens[name]["token_s"]
            yield entry(f"decoding with {WORDS['ours']} / {WORDS[name]}", ratio, "")


def paging(found: Found) -> Iterator[Found]:
    contenders = found.get("paging", {})
    if not {"resident", "paged"} <= set(contenders):
        return
    base, paged = contenders["resident"], contenders["paged"]
    said = [_host_or_device(paged)]
    if "moved_in_mb" in paged:
        said.append(f"{paged['moved_in_mb']:,.0f} MB in and {paged['moved_out_mb']:,.0f} MB out a step")
        if found.get("link"):
            ways = (("moved_in_mb", "to_device"), ("moved_out_mb", "to_host"))
            times = [paged[moved] * 1e9 / found["link"][way] for moved, way in ways]
            said[-1] += " take {:.3g} and {:.3g} ms alone".format(*times)
    times = [1e3 * found[key] for found in (base, paged) for key in ("optimizer_s", "optimizer_host_s")]
    said.append("its optimizer alone {2:.3g} ms ({3:.3g} of the host's), the other's {0:.3g} ({1:.3g})".format(*times))
    ratio = paged["step_s"] / base["step_s"]
    yield entry("paged optimizer's step / resident", ratio, "; ".join(filter(None, said)), at_most=1.05)
    losses = f"{paged['loss_last']:.6f} and {base['loss_last']:.6f}"
    yield entry("paged optimizer's last loss - resident", paged["loss_last"] - base["loss_last"], losses)
    if "peak_mb" in base and "peak_mb" in paged:
        peaks = f"{paged['peak_mb']:,.0f} and {base['peak_mb']:,.0f} MB"
        if "reserved_mb" in paged:
            peaks += "; reserved {:,.0f} and {:,.0f}".format(*(one["reserved_mb"] for one in (paged, base)))
            peaks += f"; {paged.get('alloc_retries', 0)} times no memory was left that was not cached"
        yield entry("paged optimizer's peak / resident", paged["peak_mb"] / base["peak_mb"], peaks, at_most=0.75)
        share, states = base["state_mb"] / base["peak_mb"], f"{base['state_mb']:,.0f} MB of states"
        yield entry("states / resident peak", share, states, at_least=1 / 3)


def paged_steps(found: Found) -> Iterator[Found]:
    """A paged optimizer's step with its model, without, without copies, and a bare loop that moves the same pages."""
    paged = found.get("paging", {}).get("paged", {})
    if paged.get("timeline"):
        yield entry("paged optimizer's step, ms", 1e3 * paged["optimizer_s"], paged["timeline"]["reading"])
    if paged.get("all_there"):
        times = paged["all_there"]
        said = f"{1e3 * times['optimizer_host_s']:.3g} of the host's"
        yield entry("paged optimizer's step without a budget, ms", 1e3 * times["optimizer_s"], said)
    for name, times in found.get("optimizer_alone", {}).items():
        if times and "optimizer_s" in times:
            parts = ("optimizer_host_s", "optimizer_stream_s")
            said = "{:.3g} of the host's, {:.3g} until its stream is done".format(
                *(1e3 * times[part] for part in parts)
            )
            yield entry(f"paged optimizer alone, {name}, ms", 1e3 * times["optimizer_s"], said)
        elif times:
            said = f"{times['bytes_per_s'] / 1e9:.3g} GB/s each way, {times['host_ms']:.3g} ms of the host's"
            yield entry(f"{name}, ms", times["ms"], said)
