"""What a user asks of an exit policy (``Target``), and what a policy guarantees (``Promise``). No NumPy here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from stage1_pro.command import Count, Flag, Share, refusal
from stage1_pro.errors import InputError, nearest
from stage1_pro.record import Record
from stage1_pro.registry import Registry

if TYPE_CHECKING:
    from stage1_pro.policies.policy import Policy

Guarantee = Literal["none", "ltt"]
Variant = Literal["pac", "I", "T", "naive"]
Loss = Literal["miscoverage", "fnr"]
Score = Literal["lac", "aps", "raps"]
Cells = Literal["stage", "class"]
Strength = Literal["none", "on average", "certified"]
_STRENGTHS: tuple[Strength, ...] = ("none", "on average", "certified")
# Two deltas that differ by the rounding of a sum are one.
_ROUNDING = 1 + 1e-9
# Risks that exits can be asked to keep below a limit, by their fields, and the limit where none is.
_RISKS = {
    "exit_error": "exit error", "fnr": "FNR on exits", "cascade_error": "cascade error", "disagreement": "disagreement"
}  # fmt: skip
_EXIT_ERROR = 0.05


class Promise(Record):
    """One guarantee of a policy: a quantity is at most, or at least, a limit."""

    quantity: str = Field(
        description="exit error, coverage, FNR on exits, cascade error, disagreement, share accepted, risk, FNR of "
        "accepted sets"
    )
    limit: float = Field(gt=0, lt=1)
    bound: Literal["at most", "at least"] = "at most"
    of: Literal["all", "each class", "each answer", "each stage", "each source"] = "all"
    label: str | None = Field(None, description="the class that the quantity is a rate of; null: all classes")
    strength: Strength = Field(
        "certified", description="certified: of these very thresholds, with probability 1 - delta"
    )
    delta: float | None = Field(None, gt=0, lt=1, description="chance that it is false; null unless certified")
    unit: Literal["group", "photo"] = Field("group", description="drawn anew: one image of a new group, or any image")
    prior: float | None = Field(
        None, gt=0, lt=1, description="share of a class that it holds for; null: as classes came in calibration"
    )
    prior_of: str | None = Field(None, description="that class")

    @property
    def name(self) -> str:
        """The quantity with what it is of, such as ``risk of each class``."""
        return self.quantity if self.of == "all" else f"{self.quantity} of {self.of}"

    @property
    def within_class(self) -> bool:
        """Whether it speaks of images of one class alone, so that another mix of classes leaves it as it is."""
        return self.label is not None or self.of == "each class"

    def __str__(self) -> str:
        """In words, such as ``exit error at most 0.02 (certified, delta 0.05)``."""
        of = "" if self.label is None else f" of '{self.label}'"
        sure = self.strength if self.delta is None else f"{self.strength}, delta {self.delta:g}"
        prior = "" if self.prior is None else f" where '{self.prior_of}' has a share of {self.prior:g}"
        return f"{self.name}{of} {self.bound} {self.limit:g}{prior} ({sure})"

    def covers(self, other: Promise) -> bool:
        """Whether whoever was given ``other`` is given no less by this one.

        A certified limit of each class or stage covers the same limit of all: the whole is a mixture of its parts.
        """
        same = ("quantity", "bound", "label", "unit", "prior", "prior_of")
        if any(getattr(self, name) != getattr(other, name) for name in same):
            return False
        if self.of != other.of and not (other.of == "all" and self.strength == "certified"):
            return False
        if self.limit > other.limit if self.bound == "at most" else self.limit < other.limit:
            return False
        if _STRENGTHS.index(self.strength) < _STRENGTHS.index(other.strength):
            return False
        return other.delta is None or (self.delta is not None and self.delta <= other.delta * _ROUNDING)


class Target(Record):
    """What a policy is asked for; the base of ``Softmax``, ``Gate``, ``Scrc`` and of what others register."""

    model_config = ConfigDict(allow_inf_nan=True)  # ranges refuse it, in their own words

    aliases: ClassVar[Mapping[str, str]] = {}  # other names of its fields on the command line
    configured: ClassVar[Mapping[str, str]] = {}  # fields that the configuration's ``calibrate`` calls otherwise

    policy: str
    guarantee: Guarantee = Field("ltt", description="ltt = certified, or refused; none = empirical, promises nothing")
    delta: Share = Field(0.05, description="largest chance of a false certificate, all claims together")
    claims: Count = Field(1, le=10**6, description="claims that delta is divided for, before the first")
    allow_useless: bool = Field(
        False, description="certify also what is no better than always answering the commonest class; put on record"
    )

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Make one from its fields, each of its own type: text is no number.

        Raises:
            InputError: a field is missing, unknown, of another type, or outside its range.
        """
        try:
            plain = {name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}
            return cls.model_validate(plain, strict=True)
        except ValidationError as error:
            raise InputError(refusal(error, cls)) from None

    @classmethod
    def settle(cls, given: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
        """Values for the fields: those given, over those of a configuration."""
        return {**base, **given}

    @abstractmethod
    def promises(self, positive: str | None) -> tuple[Promise, ...]:
        """What is asked for, and with what strength; what a policy certified for it guarantees.

        Args:
            positive: name of the positive class; None: no class is the positive one.

        Raises:
            InputError: something is asked of the positive class, and there is none.
        """

    def watched(self) -> float | None:
        """The largest exit error, which audits of exits can test; None where the target says nothing of it."""
        return None

    @abstractmethod
    def key(self) -> str:
        """The target as ``claims.json`` names it: the same words are the same claim, delta apart."""

    def words(self) -> str:
        """The target in words, for messages."""
        return self.key()

    def level(self, one: Promise, n_classes: int) -> float:
        """The share of delta that the test of one of its promises has, with this number of classes."""
        del one, n_classes
        return self.delta / self.claims

    @property
    def largest(self) -> int | None:
        """Photos of the largest group where the promise is of photos; None where it is of groups."""
        return None

    @property
    def served_prior(self) -> float | None:
        """Share of a class that the promise is for; None: as classes come in calibration."""
        return None

    def _promise(
        self, quantity: str, limit: float, bound: Literal["at most", "at least"] = "at most", label: str | None = None
    ) -> Promise:
        unit: Literal["group", "photo"] = "group" if self.largest is None else "photo"
        strength: Strength = "none" if self.guarantee == "none" else "certified"
        delta = None if self.guarantee == "none" else self.delta / self.claims
        return Promise(
            quantity=quantity, limit=limit, bound=bound, label=label, strength=strength, delta=delta, unit=unit
        )


class OfExits(Target):
    """What is asked of exits: limits of risks, of which one at least, and a least coverage.

    Of groups, one photo drawn from each, or of photos, of which large groups hold more.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "alpha": "exit_error", "max_exit_error": "exit_error", "target_fnr": "fnr", "min_coverage": "least_coverage"
    }  # fmt: skip

    exit_error: Share | None = Field(
        None, description="largest share of wrong answers among exits; .05 where no other risk is limited"
    )
    fnr: Share | None = Field(None, description="largest share that Stage A misses among exits of one class")
    fnr_class: Annotated[str | None, Flag(name="--class", metavar="NAME")] = Field(
        None, description="with fnr or prior: that class; the positive one by default"
    )
    cascade_error: Share | None = Field(
        None, description="largest share of wrong answers of the whole cascade, of all photos"
    )
    disagreement: Share | None = Field(
        None, description="largest share of exits that Stage B would answer otherwise; needs no labels"
    )
    least_coverage: Share | None = Field(None, description="least share of photos that exit")
    unit: Literal["group", "photo"] = Field(
        "group", description="what a rate is of: one photo drawn from a new group, or any photo (needs largest_group)"
    )
    by: Literal["class"] | None = Field(
        None,
        description="class: a certificate of its own for the exits with each answer, delta shared; classes that cannot "
        "be certified never exit, the others stand",
    )
    largest_group: Count | None = Field(
        None, description="with unit photo: photos of the largest group that can ever come; larger ones are refused"
    )

    prior: Share | None = Field(
        None, description="share of the class where it will serve; limits then hold for that mix, if only it shifts"
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """Fields by their names, for older ones and where no risk is limited."""
        if not isinstance(given, Mapping):
            return given
        values: dict[str, Any] = {}
        for name, value in given.items():
            field = cls.aliases.get(name, name)
            if field in values or (field != name and field in given):
                raise ValueError(f"{name} and {field} must not both be given, which are one")
            values[field] = value
        if all(values.get(name) is None for name in _RISKS):
            values["exit_error"] = _EXIT_ERROR
        return values

    @model_validator(mode="after")
    def _stated(self) -> Self:
        if (self.unit == "photo") != (self.largest_group is not None):
            raise ValueError(
                f"largest_group must go with unit photo, got {self.largest_group} with unit {self.unit}; a promise of "
                "photos needs the size of the largest group that can ever come"
            )
        if self.prior is not None and (self.unit == "photo" or self.guarantee == "none"):
            raise ValueError(
                f"prior must go with guarantee ltt and unit group, got it with {self.guarantee} and {self.unit}; what "
                "is not certified, or is of photos, is not moved to another mix of classes"
            )
        if (
            self.prior is not None
            and [name for name, _ in self._limits()] == ["FNR on exits"]
            and not self.least_coverage
        ):
            raise ValueError(
                "prior must go with a limit of all photos, got it with fnr alone, which holds at any prior"
            )
        if self.fnr_class is not None and self.fnr is None and self.prior is None:
            raise ValueError(f"fnr_class must go with fnr or prior, got '{self.fnr_class}' alone; add --fnr or --prior")
        others = ("fnr", "cascade_error", "disagreement", "least_coverage", "largest_group", "prior")
        beside = [name for name in others if getattr(self, name) is not None]
        if self.by is not None and (beside or self.exit_error is None):
            raise ValueError(f"by must go with exit_error alone, of groups, got it with {', '.join(beside)}")
        return self

    @classmethod
    def settle(cls, given: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
        """The same; risks that are given take the place of those of a configuration."""
        asked = any(given.get(name) is not None for name in _RISKS)
        dropped = (*_RISKS, "fnr_class") if asked else ()
        return {**{name: one for name, one in base.items() if name not in dropped}, **given}

    def promises(self, positive: str | None) -> tuple[Promise, ...]:
        """The coverage and each risk, where they were asked for."""
        label = self.fnr_class or positive
        for name in ("fnr", "prior"):
            if (asked := getattr(self, name)) is not None and label is None:
                raise InputError(
                    f"{name} must say of which class it is where no class is the positive one, got {asked:g} alone; "
                    "add --class NAME (fnr_class)"
                )
        least = self.least_coverage
        found = [] if least is None else [self._promise("coverage", least, "at least")]
        for quantity, limit in self._limits():
            found.append(self._promise(quantity, limit, label=label if quantity == "FNR on exits" else None))
        # Within one class the mix of classes says nothing.
        mix = {} if self.prior is None else {"prior": self.prior, "prior_of": label}
        found = [one if one.label else one.model_copy(update=mix) for one in found]
        if self.by is not None:
            found = [one.model_copy(update={"of": "each answer"}) for one in found]
        return tuple(found)

    def level(self, one: Promise, n_classes: int) -> float:
        """The share of delta that the test of one of its promises has: all of it, or that of one answer."""
        return super().level(one, n_classes) / (1 if self.by is None else n_classes)

    def _limits(self) -> list[tuple[str, float]]:
        return [(said, limit) for name, said in _RISKS.items() if (limit := getattr(self, name)) is not None]

    def watched(self) -> float | None:
        """The largest exit error, where it is limited."""
        return self.exit_error

    @property
    def largest(self) -> int | None:
        """Photos of the largest group where the promise is of photos."""
        return self.largest_group

    @property
    def served_prior(self) -> float | None:
        """Share of a class that the promise is for."""
        return self.prior

    def key(self) -> str:
        """The target as ``claims.json`` names it."""
        coverage = [] if self.least_coverage is None else [f"coverage >= {self.least_coverage!r}"]
        return ", ".join([*coverage, *self._wishes(repr)]) + self._of_what(repr)

    def words(self) -> str:
        """The target in words."""
        coverage = "" if self.least_coverage is None else f"coverage >= {self.least_coverage:g} with "
        return coverage + " and ".join(self._wishes("{:g}".format)) + self._of_what("{:g}".format)

    def _wishes(self, number: Callable[[float], str]) -> list[str]:
        of = "" if self.fnr_class is None else f" of '{self.fnr_class}'"
        return [f"{said}{of if said == 'FNR on exits' else ''} <= {number(limit)}" for said, limit in self._limits()]

    def _of_what(self, number: Callable[[float], str]) -> str:
        each = "" if self.by is None else ", for each answer"
        photos = each if self.largest is None else f", of photos in groups of at most {self.largest}"
        of = "positives" if self.fnr_class is None else f"'{self.fnr_class}'"
        return photos if self.prior is None else f"{photos}, where {of} have a share of {number(self.prior)}"


class Softmax(OfExits):
    """Exit by the largest probability of Stage A."""

    policy: Literal["softmax"] = "softmax"


class Gate(OfExits):
    """Exit by the gate's P(Stage A is correct)."""

    policy: Literal["gate"] = "gate"


class Scrc(Target):
    """After the cascade: sets of classes for what is accepted, few of which miss the label; nobody answers the rest."""

    aliases: ClassVar[Mapping[str, str]] = {"exit_error": "max_exit_error", "least_coverage": "min_coverage"}
    configured: ClassVar[Mapping[str, str]] = {"max_exit_error": "exit_error", "min_coverage": "least_coverage"}

    policy: Literal["scrc"] = "scrc"
    alpha: Share = Field(0.01, description="largest risk among the accepted")
    min_coverage: Share = Field(0.70, description="least share of images that are accepted")
    variant: Variant = Field(
        "pac", description="pac = for the very thresholds found; I, T = in expectation; naive promises nothing"
    )
    loss: Loss = Field("miscoverage", description="risk that the set misses the label; fnr = of positives alone")
    score: Score = Field("lac", description="nonconformity of a class")
    cells: Cells | None = Field(
        None, description="a limit for each stage that answers or each class; null = one for all"
    )
    allow_empty: bool = Field(False, description="let sets be empty")
    raps: tuple[float, int] = Field((0.01, 2), description="penalty for each rank beyond the second number")
    max_exit_error: Share = Field(
        0.01, description="of the exit rule on the rows that fit it; it promises nothing of its own"
    )

    @classmethod
    def settle(cls, given: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
        """The same, with a variant and a guarantee that say one thing: naive is what promises nothing.

        Raises:
            InputError: both are given and say different things.
        """
        variant, guarantee = given.get("variant"), given.get("guarantee")
        if variant is None:
            variant = base.get("variant") or "pac"
            if (guarantee or base.get("guarantee")) == "none":
                variant = "naive"
            elif guarantee == "ltt" and variant == "naive":
                variant = "pac"
        wanted = "none" if variant == "naive" else "ltt"
        if guarantee not in (None, wanted):
            raise InputError(
                f"guarantee must be {wanted} with variant {variant}, got {guarantee}; naive alone promises nothing"
            )
        return {**base, **given, "variant": variant, "guarantee": wanted}

    @model_validator(mode="after")
    def _one_meaning(self) -> Scrc:
        wanted = "none" if self.variant == "naive" else "ltt"
        if self.guarantee != wanted:
            raise ValueError(f"guarantee must be {wanted} with variant {self.variant}; naive alone promises nothing")
        return self

    def promises(self, positive: str | None) -> tuple[Promise, ...]:
        """Share accepted, and the risk of sets by its loss and cells."""
        share = self._promise("share accepted", self.min_coverage, "at least")
        risk = self._promise("risk", self.alpha)
        if self.loss == "fnr":
            if positive is None:
                raise InputError(
                    "loss must be miscoverage where no class is the positive one, got fnr, which is of the positive "
                    "class; --cells class limits the risk of each class"
                )
            risk = self._promise("FNR of accepted sets", self.alpha, label=positive)
        if self.cells is not None:
            risk = risk.model_copy(update={"of": f"each {self.cells}"})
        average = {"strength": "on average", "delta": None}
        if self.variant in ("I", "T"):
            risk = risk.model_copy(update=average)
        return share.model_copy(update=average) if self.variant == "T" else share, risk

    def level(self, one: Promise, n_classes: int) -> float:
        """A fifth of delta for the selection, the rest for the risk, divided by classes where each has a limit."""
        share, cells = (1, 1) if one.quantity == "share accepted" else (4, n_classes if self.cells == "class" else 1)
        return share * self.delta / 5 / self.claims / cells

    def key(self) -> str:
        """The target as ``claims.json`` names it."""
        return (
            f"accepted >= {self.min_coverage!r}, {self.loss} <= {self.alpha!r}, variant {self.variant}, score "
            f"{self.score}, cells {self.cells}, empty sets {self.allow_empty}, exit rule {self.max_exit_error!r}"
        ) + ("" if self.score != "raps" or self.raps == (0.01, 2) else f", raps {self.raps!r}")

    def words(self) -> str:
        """The target in words."""
        risk = "sets that miss the label" if self.loss == "miscoverage" else "positives whose set lacks the positive"
        each = "" if self.cells is None else f", for each {self.cells}"
        return f"accepted >= {self.min_coverage:g} with {risk} <= {self.alpha:g}{each}"


POLICIES: Registry[type[Policy]] = Registry(
    "policy",
    "stage1_pro.policies",
    {
        "softmax": "stage1_pro.policies.softmax:Thresholds",
        "gate": "stage1_pro.policies.gate:GateParams",
        "scrc": "stage1_pro.policies.sets:ScrcParams",
    },
)
# What is asked of those that are defined here, known without importing the policies and NumPy.
_HERE: dict[str, type[Target]] = {"softmax": Softmax, "gate": Gate, "scrc": Scrc}


def kind_of_target(policy: str) -> type[Target]:
    """What a policy is asked for.

    Raises:
        InputError: no such policy.
    """
    return _HERE.get(policy) or POLICIES.find(policy).asks


def parse_target(values: Mapping[str, Any]) -> Target:
    """A target from its fields, of which ``policy`` says whose they are.

    Raises:
        InputError: a field is missing, unknown, or outside its range, or no such policy.
    """
    return kind_of_target(str(values.get("policy"))).of(**values)


def settle_target(base: Any, given: Mapping[str, Any]) -> Target:
    """What is asked for: the given values over a configuration's, checked before any row is looked at.

    Args:
        base: a configuration's ``calibrate``; None: the targets' own defaults.
        given: ``policy`` and fields of its target, by their names or aliases.

    Raises:
        InputError: a field of another policy, two names of one field, or what ``parse_target`` refuses.
    """
    policy = given.get("policy", getattr(base, "policy", "softmax"))
    guarantee = given.get("guarantee", getattr(base, "guarantee", "ltt"))
    options = [*POLICIES, *([] if base is None else ["auto"])]
    if policy not in options:
        raise InputError(f"policy must be {' or '.join(options)}, got '{policy}'{nearest(policy, options)}")
    kind = kind_of_target(policy)
    named: dict[str, Any] = {"policy": policy}
    for name, value in given.items():
        if name == "policy":
            continue
        field = kind.aliases.get(name, name)
        if field not in kind.model_fields:
            asks = {known: kind_of_target(known) for known in POLICIES}
            owners = [one for one in reversed(asks) if name in asks[one].model_fields]
            others = [one for one in asks if name in asks[one].aliases]
            if owners or others:
                raise InputError(
                    f"{name} must go with policy {' or '.join(others + owners)}, got it with {policy}; drop it or add "
                    f"--policy {(others + owners)[-1]}"
                )
        if field in named or (field != name and given.get(field) is not None):
            raise InputError(f"{name} and {field} must not both be given with policy {policy}, which calls them one")
        named[field] = value
    names = {field: kind.configured.get(field, field) for field in kind.model_fields if field != "policy"}
    values = {field: one for field, name in names.items() if (one := getattr(base, name, None)) is not None}
    found = parse_target(kind.settle(named, values))
    for name in ("delta", "claims"):
        if found.guarantee != "ltt" and name in named:
            raise InputError(f"{name} must go with guarantee ltt, got it with {guarantee}; nothing is promised there")
    return found
