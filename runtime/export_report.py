"""`ExportReport`: what an export wrote, and how far each folded tensor is from the exact sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import CheckpointError
from .fold import LayerError
from .formats.atomic import write_file
from .formats.checkpoint_dir import read_json
from .verify import VerifyResult


@dataclass
class ExportReport:
    """The result of `export`.

    `layers` (with `report=True`) holds one LayerError for each folded tensor, the largest relative error first: the
    written tensor against the fp64 sum of the base that was folded into and all adapters. `folded` counts the tensors
    that an adapter changed, `quantized` those that are stored in 4 bits, `copied` those that are neither. `verification`
    is set with `verify=True`, `corrected` with a `correction_rank`: each 4-bit layer's error with the correction on it.
    """

    out: Path
    format: str
    base_precision: str
    adapters: dict[str, float]
    folded: int = 0
    copied: int = 0
    quantized: int = 0
    total_bytes: int = 0
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0
    layers: list[LayerError] = field(default_factory=list)
    verification: VerifyResult | None = None
    corrected: list[LayerError] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return {
            "out": str(self.out),
            "format": self.format,
            "base_precision": self.base_precision,
            "adapters": dict(self.adapters),
            "folded": self.folded,
            "copied": self.copied,
            "quantized": self.quantized,
            "total_bytes": self.total_bytes,
            "files": list(self.files),
            "seconds": self.seconds,
            "layers": [layer.to_dict() for layer in self.layers],
            "corrected": [layer.to_dict() for layer in self.corrected],
            "verification": self.verification.to_dict() if self.verification else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExportReport:
        """What `to_dict` gave, and `export --json` printed. Raises KeyError, TypeError where it is something else."""
        layers, corrected = ([LayerError(**layer) for layer in values[name]] for name in ("layers", "corrected"))
        verified = values["verification"]
        read = {"out": Path(values["out"]), "layers": layers, "corrected": corrected}
        return cls(**(dict(values) | read | {"verification": VerifyResult(**verified) if verified else None}))

    def counts(self) -> str:
        """ "6 folded and 23 copied tensors", and what else there is."""
        some = [f"{n} {what}" for n, what in ((self.folded, "folded"), (self.quantized, "quantized")) if n]
        return " and ".join([*([", ".join(some)] if some else []), f"{self.copied} copied tensors"])

    def base_text(self) -> str:
        """What the adapters were folded into; nothing where there are none."""
        return f", base precision {self.base_precision}" if self.adapters else ""

    def to_html(self, path: Path | str) -> Path:
        """The same as one HTML file without scripts. Raises OutputError."""
        import jinja2

        text = Path(__file__).with_name("export_report.html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        return write_file(path, environment.from_string(text).render(report=self))

    def print(self, file: IO[str] | None = None, limit: int = 20) -> None:
        """A summary, and with `report=True` a table of the `limit` worst layers."""
        from rich.console import Console
        from rich.table import Table

        console = Console(file=file, soft_wrap=True)
        if not console.is_terminal:
            console.width = 160  # a file or a pipe has no width: whole module names
        console.print(
            f"Wrote {self.out}: {self.counts()}, "
            f"{self.total_bytes / 1e6:,.1f} MB in {self.seconds:.1f} s{self.base_text()}.",
            highlight=False,
            markup=False,
        )
        for title, layers in (("", self.layers), (" with the correction", self.corrected)):
            if not layers:
                continue
            table = Table(title=f"Error against the exact sum{title}, worst first")
            table.add_column("layer", overflow="fold")
            for column in ("max", "mean", "relative", "1 - cosine"):
                table.add_column(column, justify="right")
            for layer in layers[:limit]:
                values = (layer.max_abs, layer.mean_abs, layer.relative, max(0.0, 1 - layer.cosine))
                table.add_row(layer.name, *(f"{value:.2e}" for value in values))
            console.print(table)
            if len(layers) > limit:
                console.print(f"... and {len(layers) - limit} layers with less.", highlight=False)
        if self.verification:
            console.print(self.verification.sentence(), highlight=False, markup=False)


def read_export_report(file: Path) -> ExportReport:
    """The report that `export --json` printed, from a file. Raises CheckpointError."""
    try:
        return ExportReport.from_dict(read_json(file))
    except (KeyError, TypeError):
        raise CheckpointError(f"{file} is not an export's report: write one with `export --report --json`.") from None
