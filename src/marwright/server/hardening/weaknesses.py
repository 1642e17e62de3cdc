"""What an audit of config.properties may find, each with an id that never changes its meaning.

TS1 addresses, TS2 who may do what, TS3 where code comes from and what it sees, TS4 files, TS5
limits, TS6 Java, TS7 the file itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from marwright.archive.checks.findings import Severity

__all__ = ["Finding", "find", "Weakness", "WEAKNESSES"]


@dataclass(frozen=True)
class Weakness:
    """A kind of finding."""

    id: str
    severity: Severity
    why: str
    """What it lets happen, in one line without a full stop."""
    remedy: str


@dataclass(frozen=True)
class Finding:
    """One thing that an audit found in a configuration."""

    id: str
    severity: Severity
    key: str
    """The key, or the environment variable, that it stands in; empty for the file as a whole."""
    found: str
    """What it is set to, or what is amiss with that; never a password."""
    why: str
    remedy: str
    mended: str | None = None
    """The value that closes it, "" for the key taken out; None where a person has to choose."""

    def __str__(self) -> str:
        """Return one line: severity, id, what was found, why it matters, what to do."""
        place = f"{self.key}={self.found}" if self.key else self.found
        return f"{self.severity} {self.id} {place}: {self.why}; {self.remedy}"

    def to_json(self) -> dict[str, Any]:
        """Return the finding as `--json` prints it."""
        values = {**asdict(self), "severity": str(self.severity)}
        return {key: value for key, value in values.items() if value is not None}


def find(id: str, key: str, found: str, *, mended: str | None = None) -> Finding:
    """Return a finding of the kind `id`."""
    weakness = WEAKNESSES[id]
    return Finding(id, weakness.severity, key, found, weakness.why, weakness.remedy, mended)


def _index(*weaknesses: Weakness) -> dict[str, Weakness]:
    return {weakness.id: weakness for weakness in weaknesses}


NOTE, WARNING = Severity.NOTE, Severity.WARNING
ERROR, DANGER = Severity.ERROR, Severity.DANGER

LOOPBACK = "bind it to 127.0.0.1, behind a proxy"
SWITCH = "set it to false"

WEAKNESSES: dict[str, Weakness] = _index(
    Weakness("TS101", ERROR, "other machines reach predictions", LOOPBACK),
    Weakness("TS102", DANGER, "other machines may register models, that is code", LOOPBACK),
    Weakness("TS103", ERROR, "other machines read metrics, which ask for no token", LOOPBACK),
    Weakness("TS104", ERROR, "other machines reach predictions by gRPC", LOOPBACK),
    Weakness("TS105", DANGER, "other machines may register models by gRPC", LOOPBACK),
    Weakness(
        "TS106",
        ERROR,
        "TorchServe takes no such address and does not start",
        "write http://HOST:PORT, https://HOST:PORT or unix:/PATH",
    ),
    Weakness(
        "TS107",
        ERROR,
        "whoever reaches predictions reaches management too",
        "give management_address a port of its own",
    ),
    Weakness(
        "TS108",
        ERROR,
        "tokens and inputs cross the network in clear text",
        "use https, or a proxy that does",
    ),
    Weakness(
        "TS109",
        ERROR,
        "TorchServe makes a certificate at start that no client can check",
        "name certificate_file and private_key_file",
    ),
    Weakness(
        "TS110",
        ERROR,
        "gRPC takes no keystore, and does not start without both files",
        "name certificate_file and private_key_file",
    ),
    Weakness("TS201", DANGER, "every request is answered without a token", SWITCH),
    Weakness(
        "TS202",
        WARNING,
        "whoever holds the management token loads code into the server",
        "set it to false where models are all loaded at start",
    ),
    Weakness(
        "TS203",
        WARNING,
        "a stolen token is good for longer than an hour",
        "leave it at 60 or below; marwright's client renews tokens",
    ),
    Weakness(
        "TS204",
        WARNING,
        "pages of other sites may call this server from a user's browser",
        "take it out; call the server from your own back end",
    ),
    Weakness(
        "TS205",
        WARNING,
        "TS_ variables change any key, past this file",
        SWITCH,
    ),
    Weakness("TS206", WARNING, "a variable may open allowed_urls, past this file", SWITCH),
    Weakness(
        "TS301",
        ERROR,
        "the server fetches and runs archives from anywhere",
        "set it to none; register files of the store",
    ),
    Weakness(
        "TS302",
        WARNING,
        "an archive that comes in clear text may be changed on its way",
        "allow https:// alone",
    ),
    Weakness(
        "TS303",
        ERROR,
        "POST /workflows writes into the model store",
        "name an empty, read-only folder",
    ),
    Weakness("TS304", ERROR, "an archive's requirements run pip, and what pip fetches", SWITCH),
    Weakness(
        "TS305",
        ERROR,
        "a model's code sees every environment variable",
        "set the pattern of docs/security.md",
    ),
    Weakness(
        "TS306",
        WARNING,
        "variables that look secret reach the workers",
        "widen the pattern: it has to match the whole name, and minds case without (?i)",
    ),
    Weakness(
        "TS307",
        ERROR,
        "the pattern hides what workers need to start",
        "narrow the pattern: PATH, PYTHONPATH and LD_LIBRARY_PATH have to pass",
    ),
    Weakness(
        "TS308",
        WARNING,
        "every jar of that folder runs inside the server",
        "take it out, or keep the folder read-only",
    ),
    Weakness(
        "TS309", WARNING, "the server runs that command every minute", "take it out, or review it"
    ),
    Weakness(
        "TS310",
        WARNING,
        "an archive is fetched at start, and nothing checks what came",
        "put it into the store: marwright store add",
    ),
    Weakness(
        "TS401",
        ERROR,
        "the keystore's password stands in the file, or is the known default",
        "use certificate_file and private_key_file, or $$NAME$$ for a variable",
    ),
    Weakness("TS402", ERROR, "other users read the private key", "chmod 600"),
    Weakness("TS403", DANGER, "other users write archives that the server loads", "chmod go-w"),
    Weakness("TS404", DANGER, "other users write the configuration, vmargs included", "chmod go-w"),
    Weakness("TS405", ERROR, "there is no such file", "name one that is there"),
    Weakness(
        "TS501",
        WARNING,
        "a few large requests fill the memory; each is held as a whole",
        "set what your largest input needs",
    ),
    Weakness(
        "TS502",
        WARNING,
        "a few large answers fill the memory",
        "set what your largest answer needs",
    ),
    Weakness("TS503", ERROR, "a small file may decode to an image of gigabytes", "set it to true"),
    Weakness(
        "TS504",
        WARNING,
        "requests wait in memory long after their clients have gone",
        "set it to 100 or less",
    ),
    Weakness(
        "TS505",
        NOTE,
        "the metrics address stays empty",
        "set it to prometheus",
    ),
    Weakness(
        "TS601",
        WARNING,
        "Java may take a quarter of the memory",
        "add -Xmx1g, or what it needs",
    ),
    Weakness(
        "TS602",
        WARNING,
        "memory outside Java's heap has no limit of its own",
        "add -XX:MaxDirectMemorySize=512m",
    ),
    Weakness(
        "TS603",
        WARNING,
        "out of memory, the server goes on half alive",
        "add -XX:+ExitOnOutOfMemoryError",
    ),
    Weakness("TS604", DANGER, "whoever reaches the debugger runs any code", "take it out"),
    Weakness("TS605", DANGER, "whoever reaches the JMX port runs any code", "take it out"),
    Weakness("TS606", WARNING, "an agent sees all that the server does", "take it out"),
    Weakness("TS701", WARNING, "TorchServe passes over it in silence", "correct or remove it"),
    Weakness("TS702", WARNING, "only the last one counts", "keep one of them"),
    Weakness(
        "TS703",
        ERROR,
        "TorchServe does not start without that variable",
        "set it, or write the value",
    ),
    Weakness("TS704", ERROR, "TorchServe does not start with it", "write a number"),
    Weakness("TS705", WARNING, "all but true counts as false", "write true or false"),
    Weakness(
        "TS706",
        WARNING,
        "the blanks at its end belong to the value: 'true ' is not true",
        "remove them",
    ),
    Weakness(
        "TS707",
        WARNING,
        "TorchServe reads the file that TS_CONFIG_FILE names, and not this one",
        "unset it, or audit that file",
    ),
    Weakness(
        "TS708", WARNING, "it is no pattern, as far as Python can tell", "correct the pattern"
    ),
)
"""Every kind of finding by its id."""
