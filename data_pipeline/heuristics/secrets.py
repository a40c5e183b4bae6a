"""Credentials and personal data in texts: found, counted, and replaced by fixed placeholders.

Credentials are found by their issuers' formats, by the assignment of a random-looking string to a
name such as `api_key`, and by the plugins of detect-secrets where it is installed. Personal data
are e-mail addresses and public IP addresses. What documentation uses as an example (RFC 2606
domains, private networks, `password`) is left alone.

No value that is found ever leaves this module except inside a redacted text's gaps: callers get
kinds and counts.

Nearly all texts hold nothing, so the work is to see that quickly. A rule runs only on texts that
hold one of its key words, since a search for a word is far faster than a regular expression; where
that is not enough, only on texts that match a `hint`, a pattern that is fast because it begins with
a fixed character. Most keys are `solid`: long and without white space, so that their words need
to be looked for in the text's long words alone, which are a fifth of a program.
"""

import functools
import importlib
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

SCANNER_VERSION = 1
PII_KINDS = ("email", "ip_address")
PLACEHOLDERS = {
    "email": "<EMAIL>",
    "ip_address": "<IP_ADDRESS>",
    "private_key": "<PRIVATE_KEY>",
    "password": "<PASSWORD>",
}
DEFAULT_PLACEHOLDER = "<KEY>"
LONG_WORD = 20  # characters


@dataclass(frozen=True)
class Finding:
    """One credential or piece of personal data: its kind and where it stands in the text."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Rule:
    """A format.

    Attributes:
        kind: what it is.
        words: in lower case; the rule is for texts that hold at least one.
        pattern: group 1, if there is one, is the secret, else the whole match.
        random: the value must look random, which examples in documentation do not.
        solid: every match holds no white space, at least `LONG_WORD` characters, and a word of
            `words`; so its word stands in one of the text's long words.
        hint: a faster pattern that is found in every text in which `pattern` finds a value that
            looks real.
    """

    kind: str
    words: tuple[str, ...]
    pattern: re.Pattern[str]
    random: bool = True
    solid: bool = False
    hint: re.Pattern[str] | None = None


def _rule(kind: str, words: str, pattern: str, random: bool = True, hint: str = "") -> Rule:
    compiled = re.compile(hint) if hint else None
    return Rule(kind, tuple(words.split()), re.compile(pattern), random, hint=compiled)


def _solid(kind: str, words: str, pattern: str) -> Rule:
    return replace(_rule(kind, words, pattern), solid=True)


_END = r"(?![A-Za-z0-9_-])"
_START = r"(?<![A-Za-z0-9_-])"
RULES = (
    _rule(
        "private_key",
        "-----begin",
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:(?!-----)[\s\S]){20,16000}?"
        r"(?:-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----|\Z|(?=-----))",
        random=False,
    ),
    _rule(
        "private_key",
        "putty-user-key-file",
        r"PuTTY-User-Key-File-[23]:[\s\S]{20,4000}?Private-MAC: ?[0-9a-f]{40,64}",
        random=False,
    ),
    _solid("private_key", "age-secret-key-1", r"AGE-SECRET-KEY-1[0-9A-Z]{58}" + _END),
    _solid(
        "aws_access_key",
        "akia asia abia acca",
        _START + r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}" + _END,
    ),
    _rule(
        "aws_secret_key",
        "aws",
        r"(?i:aws[\w .\-]{0,30}?(?:key|secret|token)[\w .\-]{0,20}?[\"']?\s{0,4}[=:,]\s{0,4})"
        r"[\"']([A-Za-z0-9/+]{40})[\"']",
    ),
    _solid("github_token", "ghp_ gho_ ghu_ ghs_ ghr_", _START + r"gh[pousr]_[A-Za-z0-9]{36,255}"),
    _solid("github_token", "github_pat_", _START + r"github_pat_[A-Za-z0-9_]{22,255}"),
    _solid(
        "gitlab_token", "glpat- gldt- glrt- glptt-", _START + r"gl(?:pat|dt|rt|ptt)-[\w-]{20,64}"
    ),
    _rule("slack_token", "xox", _START + r"xox[abeoprs](?:-[A-Za-z0-9]{1,64}){2,6}"),
    _solid(
        "slack_webhook",
        "hooks.slack.com",
        r"https://hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9/_]{20,120}",
    ),
    _solid(
        "discord_webhook",
        "/api/webhooks/",
        r"https://(?:\w+\.)?discord(?:app)?\.com/api/webhooks/\d{15,22}/[\w-]{40,100}",
    ),
    _rule("discord_token", "discord", _START + r"[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40}" + _END),
    _solid("stripe_key", "k_live_ k_test_", _START + r"[rs]k_(?:live|test)_[0-9a-zA-Z]{16,120}"),
    _solid("stripe_key", "whsec_", _START + r"whsec_[A-Za-z0-9+/]{24,64}"),
    _solid("google_api_key", "aiza", _START + r"AIza[\w-]{35}" + _END),
    _solid("google_oauth", "gocspx- ya29.", _START + r"(?:GOCSPX-[\w-]{28}|ya29\.[\w-]{30,512})"),
    _solid("openai_key", "sk-", _START + r"sk-(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{20,200}"),
    _solid("huggingface_token", "hf_", _START + r"hf_[A-Za-z0-9]{30,40}" + _END),
    _rule("npm_token", "_authtoken", r":_authToken ?= ?[\"']?([A-Za-z0-9-]{20,64})" + _END),
    _solid("npm_token", "npm_", _START + r"npm_[A-Za-z0-9]{36}" + _END),
    _solid("pypi_token", "pypi-ag", r"pypi-Ag[\w-]{50,300}"),
    _solid("sendgrid_key", "sg.", _START + r"SG\.[\w-]{20,24}\.[\w-]{39,50}" + _END),
    _rule("twilio_key", "twilio", _START + r"(?:SK|AC)[0-9a-f]{32}" + _END),
    _solid("mailchimp_key", "-us", _START + r"[0-9a-f]{32}-us[0-9]{1,2}" + _END),
    _solid("mailgun_key", "key-", _START + r"key-[0-9a-f]{32}" + _END),
    _solid("telegram_token", ":aa", r"(?<![\w-])\d{8,10}:AA[\w-]{33}" + _END),
    _solid("azure_key", "accountkey=", r"AccountKey=([A-Za-z0-9+/]{86}==)"),
    _solid("jwt", "eyj", _START + r"eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{20,1000}"),
    _solid("square_token", "sq0", _START + r"sq0(?:atp|csp)-[\w-]{22,43}" + _END),
    _solid("digitalocean_token", "_v1_", _START + r"do[oprt]_v1_[0-9a-f]{64}" + _END),
    _solid("databricks_token", "dapi", _START + r"dapi[0-9a-f]{32}(?:-\d)?" + _END),
    _solid("shopify_token", "shp", _START + r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}" + _END),
    _solid("docker_token", "dckr_pat_", _START + r"dckr_pat_[\w-]{27}" + _END),
    _solid("linear_key", "lin_api_", _START + r"lin_api_[A-Za-z0-9]{40}" + _END),
    _solid("newrelic_key", "nrak-", _START + r"NRAK-[A-Z0-9]{27}" + _END),
    _rule(
        "password",
        "://",
        r"[a-z][a-z0-9+.-]{1,20}://[^\s:/@\"'<>{}$%]{1,64}:([^\s:/@\"'<>{}$%]{6,128})@[\w.-]{2,}",
        hint=r"://[^\s:/@\"'<>{}$%]{1,64}:[^\s:/@\"'<>{}$%]{6,128}@",
    ),
    _rule(
        "key",
        "key secret token credential",
        r"(?i:(?:api|access|auth|secret|private|client|app|service|consumer|encryption|signing)"
        r"[_-]?(?:key|secret|token|credential)s?|secret_?key|secret|token)(?![A-Za-z])"
        r"[\"']?\]?\s{0,4}(?::\s{0,4}str\s{0,4})?[=:]\s{0,4}[bru]?[\"']([A-Za-z0-9+/=_.~-]{20,200})[\"']",
        # The assignment of a value; `looks_real` wants three digits in it.
        hint=r"[=:]\s{0,4}[bru]?[\"'](?=(?:[A-Za-z+/=_.~-]*+[0-9]){3})"
        r"[A-Za-z0-9+/=_.~-]{20,200}[\"']",
    ),
    _rule(
        "password",
        "passw pwd passphrase",
        r"(?i:passw(?:or)?d|pwd|passphrase)[\"']?\]?\s{0,4}(?::\s{0,4}str\s{0,4})?[=:]\s{0,4}"
        r"[bru]?[\"']([^\"'\s{}<>$%]{8,64})[\"']",
    ),
)
# Plugins of detect-secrets and words, of which a text must hold one for the plugin to run. Left out
# are those that guess by entropy or by name, that are covered above, and npm's, which takes
# quadratic time.
PLUGINS = {
    "artifactory.ArtifactoryDetector": "artifactory",
    "aws.AWSKeyDetector": "akia asia aws",
    "azure_storage_key.AzureStorageKeyDetector": "accountkey=",
    "cloudant.CloudantDetector": "cloudant",
    "discord.DiscordBotTokenDetector": "discord",
    "github_token.GitHubTokenDetector": "ghp_ gho_ ghu_ ghs_ ghr_",
    "gitlab_token.GitLabTokenDetector": "glpat- gldt- glft- glsoat- glrt- gr1348941 glcbt- glimt-",
    "ibm_cloud_iam.IbmCloudIamDetector": "ibm",
    "jwt.JwtTokenDetector": "eyj",
    "mailchimp.MailchimpDetector": "-us",
    "openai.OpenAIDetector": "t3blbkfj",
    "pypi_token.PypiTokenDetector": "pypi-age",
    "sendgrid.SendGridDetector": "sg.",
    "slack.SlackDetector": "xox hooks.slack.com",
    "softlayer.SoftlayerDetector": "softlayer",
    "square_oauth.SquareOAuthDetector": "sq0csp-",
    "stripe.StripeDetector": "k_live_",
    "telegram_token.TelegramBotTokenDetector": "telegram",
    "twilio.TwilioKeyDetector": "twilio",
}
_PLUGIN_WORDS = {name: tuple(words.split()) for name, words in PLUGINS.items()}
# Those whose matches are `solid`, as in `Rule`.
SOLID_PLUGINS = {
    *("azure_storage_key", "github_token", "mailchimp", "openai"),
    *("pypi_token", "sendgrid", "square_oauth", "stripe"),
}
_MIN_PLUGIN_VALUE = 12  # characters; what is shorter is a part of a format, not a secret

# A `_HINT` is found in every text that its pattern is found in: it is the part of the pattern from
# the first fixed character on, which is what makes it fast, and looks back at what comes before.
_EMAIL_HINT = re.compile(r"@(?<=[A-Za-z0-9._%+-]@)[A-Za-z0-9-]{1,63}\.[A-Za-z0-9-]")
_EMAIL = re.compile(
    r"[A-Za-z0-9](?<![\w.+%-].)[A-Za-z0-9._%+-]{0,63}+@((?:[A-Za-z0-9-]{1,63}\.){1,5}([A-Za-z]{2,12}))\b"
    r"(?!\()"
)
# Country codes that are also common attribute names (`a@b.T`, `x@y.dt`) are not among them.
_DOMAIN_NAMES = (
    "com org net edu gov mil int info biz io dev app ai co uk de fr nl be ch at it es pt se no fi "
    "dk pl cz sk hu ro bg gr ru ua by jp cn kr tw hk sg au nz ca br mx ar cl in il za tr ee lv lt "
    "is ie eu us tv cc ly me xyz online tech cloud email"
)
_DOMAINS = frozenset(_DOMAIN_NAMES.split())
_EXAMPLE_DOMAIN = re.compile(
    r"(?i)(?:^|\.)(?:example|test|invalid|localhost|domain|email|host|yourdomain|foo|bar|spam)"
    r"(?:\.[a-z]+){0,2}$|^(?:a|b|c|x|y|z|abc|xyz)\.[a-z]+$|(?:^|\.)users\.noreply\.github\.com$"
)
_EXAMPLE_PERSON = re.compile(r"(?i)^(?:no-?reply|git|user(?:name)?|someone|you|me|name|foo|bar)@")
_IPV4_HINT = re.compile(r"\.(?<=[0-9]\.)[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_IPV4 = re.compile(r"[0-9](?<![\w.+-].)[0-9]{0,2}\.(?:[0-9]{1,3}\.){2}[0-9]{1,3}(?![\w-]|\.[0-9])")
_IPV6_HINT = re.compile(r":(?<=[23][0-9a-fA-F]{3}:)[0-9a-fA-F]{0,4}:")
_IPV6 = re.compile(
    r"[23](?<![\w:.].)[0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:])"
)
# kind, hint and pattern
PERSONAL = (
    ("email", _EMAIL_HINT, _EMAIL),
    ("ip_address", _IPV4_HINT, _IPV4),
    ("ip_address", _IPV6_HINT, _IPV6),
)
_PUBLIC_SERVERS = {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"}
_EXAMPLE_VALUE = re.compile(
    r"(?i)example|sample|dummy|placeholder|changeme|change_me|your[_-]|xxxx|\*\*\*|\.\.\.|"
    r"fake|insert|replace|redacted|123456|abcdef|password|passwd|secret_?key|<|test"
)


def scan(text: str, detect_secrets: bool) -> list[Finding]:
    """Find credentials and personal data; the findings are in order and do not overlap.

    Args:
        text: any text.
        detect_secrets: run the plugins of detect-secrets as well.
    """
    searched = _Searched(text)
    found = [*_credentials(searched), *_personal(text)]
    if detect_secrets:
        found += _plugin_findings(searched)
    # Where two overlap the one that starts first and reaches further is kept, named by its rule.
    kept: list[Finding] = []
    for finding in sorted(found, key=lambda f: (f.start, -f.end)):
        if not kept or finding.start >= kept[-1].end:
            kept.append(finding)
        elif finding.end > kept[-1].end:
            kept[-1] = Finding(kept[-1].kind, kept[-1].start, finding.end)
    return kept


class _Searched:
    r"""A text in which words are looked for, each once.

    Attributes:
        text: the text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._lowered = text.lower()
        # A `solid` match is within one of these, as `\s` and `str.split` agree on white space.
        self._long_words = "\n".join([w for w in text.split() if len(w) >= LONG_WORD]).lower()
        self._found: dict[tuple[str, bool], bool] = {}

    def holds(self, words: tuple[str, ...], solid: bool) -> bool:
        """Whether one of `words` stands in the text, or in its long words."""
        for word in words:
            found = self._found.get((word, solid))
            if found is None:
                found = word in (self._long_words if solid else self._lowered)
                self._found[word, solid] = found
            if found:
                return True
        return False


def redact(text: str, findings: list[Finding]) -> str:
    """The text with each finding replaced by its kind's placeholder."""
    pieces, position = [], 0
    for finding in findings:
        pieces.append(text[position : finding.start])
        pieces.append(PLACEHOLDERS.get(finding.kind, DEFAULT_PLACEHOLDER))
        position = finding.end
    pieces.append(text[position:])
    return "".join(pieces)


def count_kinds(findings: list[Finding]) -> dict[str, int]:
    """How many of each kind, sorted by kind."""
    return dict(sorted(Counter(finding.kind for finding in findings).items()))


def detect_secrets_version() -> str:
    """The version of detect-secrets; asked without importing it, which takes half a second.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return metadata.version("detect-secrets")
    except metadata.PackageNotFoundError:
        raise ValueError(
            "the secret scan uses detect-secrets, which is not installed: "
            "pip install 'megaphi[data]', or turn `detect_secrets` off to use our own rules alone"
        ) from None


def _credentials(searched: _Searched) -> Iterator[Finding]:
    text = searched.text
    for rule in RULES:
        if not searched.holds(rule.words, rule.solid):
            continue
        if rule.hint is not None and not rule.hint.search(text):
            continue
        group = 1 if rule.pattern.groups else 0
        for match in rule.pattern.finditer(text):
            value = match[group]
            if not rule.random or looks_real(value, rule.kind):
                yield Finding(rule.kind, *match.span(group))


def looks_real(value: str, kind: str) -> bool:
    """Whether a value is random enough to be a credential and not an example or a name."""
    if _EXAMPLE_VALUE.search(value):
        return False
    classes = sum(bool(re.search(p, value)) for p in ("[a-z]", "[A-Z]", "[0-9]", r"[^\w]"))
    if kind == "password":
        return classes >= 3 or (classes == 2 and any(map(str.isdigit, value)) and len(value) >= 10)
    if kind == "key":
        # Dotted and hyphenated names and paths are no keys; a key mixes letters and digits.
        digits = sum(map(str.isdigit, value))
        return digits >= 3 and classes >= 2 and _entropy(value) >= 3.3 and "/" not in value[:1]
    return _entropy(value[4:]) >= 2.5


def _entropy(value: str) -> float:
    """Shannon entropy of the characters, bits."""
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)


def _personal(text: str) -> Iterator[Finding]:
    for kind, hint, pattern in PERSONAL:
        is_personal = is_personal_email if kind == "email" else is_personal_address
        for match in pattern.finditer(text) if hint.search(text) else ():
            if is_personal(match[0]):
                yield Finding(kind, *match.span())


def is_personal_email(value: str) -> bool:
    """An address below a known top-level domain that is not an example."""
    domain = value.rpartition("@")[2]
    return (
        domain.rpartition(".")[2].lower() in _DOMAINS
        and not _EXAMPLE_DOMAIN.search(domain)
        and not _EXAMPLE_PERSON.match(value)
    )


def is_personal_address(value: str) -> bool:
    """A public address that is neither a well-known server nor a version number."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or value in _PUBLIC_SERVERS:
        return False
    if address.version == 4:
        octets = value.split(".")
        # 1.2.3.4 and 10.0.19041.1 are versions far more often than hosts.
        return max(map(len, octets)) > 1 and int(octets[0]) > 12 and value.count(".0") < 2
    return True


@functools.cache
def _plugin(name: str) -> Any:
    """A plugin of detect-secrets, imported when a text needs it: that takes half a second."""
    module, class_name = name.split(".")
    return getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), class_name)()


def _plugin_findings(searched: _Searched) -> Iterator[Finding]:
    text = searched.text
    for name, words in _PLUGIN_WORDS.items():
        kind = name.split(".")[0]
        if not searched.holds(words, kind in SOLID_PLUGINS):
            continue
        for value in sorted(set(_plugin(name).analyze_string(text))):
            if len(value) < _MIN_PLUGIN_VALUE or not looks_real(value, kind):
                continue
            # The plugins give values without positions, so that every occurrence counts.
            for match in re.finditer(re.escape(value), text):
                yield Finding(kind, *match.span())
