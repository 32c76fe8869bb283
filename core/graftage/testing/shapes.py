"""What secrets look like: the published forms of vendors, private keys, passwords in URLs, values named as secrets.

Words are none: what follows a prefix must look random, and placeholders such as `sk-your-key-here` are harmless.
"""

from __future__ import annotations

import base64
import re
from functools import cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["in_address", "is_placeholder", "looks_random", "shapes_in"]

_PREFIXES: Final = {
    "a GitHub token": "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
    "a GitLab token": "glpat- gldt- glft- glsoat- glrt- glcbt- glptt- glimt- glagent- gloas- glffct- GR1348941",
    "a key of Anthropic": "sk-ant-",
    "a key of OpenRouter": "sk-or-",
    "a token of Hugging Face": "hf_",
    "a key of Groq": "gsk_",
    "a key of xAI": "xai-",
    "a key of Perplexity": "pplx-",
    "a token of Replicate": "r8_",
    "a key of LangSmith": "lsv2_pt_ lsv2_sk_ ls__",
    "a Google credential": "ya29. GOCSPX- 1//0",
    "a Bedrock key": "ABSK bedrock-api-key-",
    "a Slack token": "xoxb- xoxp- xoxa- xoxr- xoxs- xoxo- xoxc- xoxd- xoxe- xoxe. xapp-",
    "a Stripe key": "sk_live_ rk_live_ sk_test_ rk_test_ whsec_",
    "a token of a package index": "npm_ pypi-Ag rubygems_ CLOJARS_ dckr_pat_ dckr_oat_ oy2",
    "a SendGrid key": "SG.",
    "a Brevo key": "xkeysib- xsmtpsib-",
    "a Shopify token": "shpat_ shpss_ shpca_ shppa_",
    "a Sentry token": "sntrys_ sntryu_",
    "a DigitalOcean token": "dop_v1_ doo_v1_ dor_v1_",
    "a HashiCorp token": "hvs. hvb. hvr.",
    "a Pulumi token": "pul-",
    "a Doppler token": "dp.pt. dp.st. dp.ct. dp.sa. dp.scim. dp.audit.",
    "a 1Password token": "ops_eyJ",
    "a Linear key": "lin_api_ lin_oauth_",
    "a Notion token": "ntn_ secret_",
    "an Atlassian token": "ATATT3 ATCTT3 ATBB ATTA",
    "a Figma token": "figd_ figo_ figu_",
    "a Postman key": "PMAK- PMAT-",
    "a PlanetScale password": "pscale_tkn_ pscale_pw_ pscale_oauth_",
    "a Grafana token": "glsa_ glc_",
    "a New Relic key": "NRAK- NRII- NRJS- NRRA- NRAA-",
    "a Square token": "sq0atp- sq0csp- EAAAE EAAAl",
    "a Supabase token": "sbp_ sb_secret_",
    "a token of a host of websites": "vcp_ vci_ vca_ vcr_ vck_ vercel_blob_rw_ nfp_ nfc_ nfo_ nfu_ HRKU- rnd_ napi_",
    "a Fly token": "fm1r_ fm2_ fo1_",
    "a Cloudflare token": "cfut_ cfat_ cfk_ v1.0-",
    "a token of a build server": "CCIPAT_ CCIPRJ_ bkua_ sqp_ squ_ sqa_ tskey-auth- tskey-api- pnu_ sgp_ rdme_ dt0c01.",
    "a key of a payment service": "duffel_live_ FLWSECK- EZAK EZTK shippo_live_ rzp_live_ fio-u- tfp_",
    "a key of Artifactory": "AKCp cmVmd",
    "an OpenShift token": "sha256~",
    "a Contentful token": "CFPAT-",
    "a Dropbox token": "sl.u. sl.B",
    "an API key": "sk- sk_ csk- api_org_ fw_ tgp_v1_ nvapi- jina_ tvly- pcsk_ esecret_ rpa_ wandb_v1_ AQ.",
}
"""The fixed beginnings of secrets. What follows has at least 16 characters and looks random. The first kind counts."""

_FORMS: Final = (
    ("a Google key", "AIza", r"AIza[\w-]{35}"),
    ("an AWS key", "A", r"(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[A-Z0-9]{16}(?![A-Za-z0-9])"),
    ("an Alibaba key", "LTAI", r"LTAI[A-Za-z0-9]{20}(?![A-Za-z0-9])"),
    ("a Tencent key", "AKID", r"AKID[A-Za-z0-9]{32}(?![A-Za-z0-9])"),
    ("a Facebook token", "EAA", r"(?<![+/])EAA[A-Za-z0-9]{80,}(?![+/=])"),
    ("a Twilio key", "SK", r"SK[0-9a-f]{32}(?![A-Za-z0-9])"),
    ("a Mailgun key", "key-", r"key-[0-9a-f]{32}(?![A-Za-z0-9])"),
    ("a Mailchimp key", "-us", r"[0-9a-f]{32}-us\d{1,2}\b"),
    ("a Voyage key", "pa-", r"pa-[\w-]{43}(?![\w-])"),
    ("a Firecrawl key", "fc-", r"fc-[0-9a-f]{32}(?![\w-])"),
    ("a Resend key", "re_", r"re_[A-Za-z0-9]{8}_[A-Za-z0-9]{20,}"),
    ("a Cargo token", "cio", r"cio[A-Za-z0-9]{32}(?![\w+/])"),
    ("a Databricks token", "dapi", r"dapi[0-9a-f]{32}"),
    ("an Airtable token", "pat", r"pat[A-Za-z0-9]{14}\.[0-9a-f]{64}"),
    ("a Terraform token", ".atlasv1.", r"[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,}"),
    ("a Telegram token", ":", r"\d{8,10}:[\w-]{35}(?![\w-])"),
    ("a Discord token", ".", r"[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,}"),
    ("a 1Password key", "A3-", r"A3-[A-Z0-9]{6}-[A-Z0-9-]{11,12}-[A-Z0-9]{5}-[A-Z0-9]{5}-[A-Z0-9]{5}"),
    ("an age key", "AGE-SECRET-KEY-", r"AGE-SECRET-KEY-1[A-Z0-9]{58}"),
    ("an Azure secret", "Q~", r"[\w~.]{3}\dQ~[\w~.-]{31,34}"),
    ("an Azure key", "JQQJ99", r"[A-Za-z0-9]{52}JQQJ99[A-Za-z0-9]{18,}"),
    ("an Azure key", "Key=", r"(?:Account|SharedAccess|Access)Key=[A-Za-z0-9+/]{40,}={0,2}"),
    ("a Mapbox token", "sk.eyJ", r"sk\.eyJ[\w-]+\.[\w-]{16,}"),
    ("a JWT", "eyJ", r"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"),
    ("a JWT", "eyJ", r"eyJ[\w-]{10,}\.[\w-]*\.[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"),
    ("a Slack token", "xox", r"xox[a-z](?:\.xox[a-z])?-\d+-[\w-]{16,}"),
    ("a Slack token", "xapp-", r"xapp-\d-\w+-\d+-\w{16,}"),
    ("a Slack hook", "hooks.slack.com/", r"hooks\.slack\.com/(?:services|workflows|triggers)/\w+/\w+/[\w/]{8,}"),
    ("a Discord hook", "/webhooks/", r"discord(?:app)?\.com/api/(?:v\d+/)?webhooks/\d+/[\w-]{20,}"),
    ("a Teams hook", "office.com/", r"office\.com/webhook\w*/[\w@-]{16,}/IncomingWebhook/\w{16,}[\w/-]*"),
)
"""Secrets of a fixed form: kind, a text that is in each, and its pattern."""

_URL: Final = re.compile(
    r"""\b[a-z][a-z0-9+.-]{1,20}://([^\s/:@"'<>?#\\]*)(?::([^\s/@"'<>\\]{3,}))?@[\w\[]""", re.ASCII
)
_PRIVATE_KEY: Final = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?=\s*(?:[\w+/=]|\Z))|PuTTY-User-Key-File-\d: "
)
"""Prose with the line in quotes holds no key."""

_NAMES: Final = {
    "a bearer token": r"\b(?:bearer|flyv1)\s+",
    "a login": r"""\bbasic\s+|["']auth["']\s*:\s*["']""",
    "a parameter of an address": r"[?&](?:key|code|auth|sig|signature)=",
    "a cookie": r"""cookie:\s*[^=;\s"]{1,60}=|session[_-]?(?:id)?=""",
    "a value that is named as a secret": r"""(?<!next.)(?<!page.)(?<!tion.)(?<!sync.)
        (?:secret|passw(?:or)?d|pwd|passphrase|credentials?|token|webhook
        |(?:api|access|account|private|auth|service)[_-]?key)(?:[_-]?(?:id|key|value))?
        ["'`]*\s*(?::=|[:=]>?)\s*["'`]*(?:token\s+)?""",
}
"""What stands before a secret, in small letters. A token of the next page is none."""
_NAMED: Final = re.compile(f"(?:{'|'.join(f'({each})' for each in _NAMES.values())})\\Z", re.ASCII | re.VERBOSE)
_STEM: Final = re.compile(
    "bearer|basic|flyv1|auth|key|code|sig|cookie|session|secret|pass|pwd|credential|token|webhook"
)
"""One of them is in each name: to look for it first takes a tenth of the time."""

_RUN: Final = re.compile(r"[\w+/.~=%:@-]{16,}", re.ASCII)
"""What a secret consists of: it has no spaces and quotes."""
_VALUE: Final = re.compile(r"[\w+/.~%-]{16,}={0,2}", re.ASCII)

_PLACEHOLDER: Final = re.compile(
    r"example|placeholder|your[_-]|(?:my|your)[_-]?(?:api|key|token|secret)|([x0*.-])\1{5}"
    r"|1234567|abcdefg|deadbeef|redacted|dummy",
    re.IGNORECASE,
)
_PLAIN_PASSWORD: Final = re.compile(
    r"[\W_x]*|<.*>|\[.*\]|\$?\{.*\}|\$\w+|%\w|(?:my|your|the|db|some|a|user|super|top)?[\W_]*"
    r"(?:pass(?:word|wd|phrase)?|pw|pwd|secret|token|key|changeme|change[\W_]me|admin|root|user|postgres|guest|tiger|test|foobar|xxx+)"
    r"[\W_]*\d{0,3}",
    re.IGNORECASE,
)


def shapes_in(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield all that looks like a secret, with its kind."""
    # Few of the words of a text are as long as a secret, and a recording repeats them: only those are searched.
    runs = "\n".join(dict.fromkeys(run for text in texts for run in _RUN.findall(text)))
    for kind, pattern in _patterns_for(runs):
        for match in pattern.finditer(runs):
            has_body = "body" in pattern.groupindex
            if not _PLACEHOLDER.search(match[0]) and (not has_body or looks_random(match["body"][:40], 0.12)):
                yield match[0], kind
    opaque = {value for value in set(_VALUE.findall(runs)) if is_opaque(value[:100])}
    for text in texts:
        yield from ((match[0], "a private key") for match in _PRIVATE_KEY.finditer(text))
        if "://" in text:
            yield from _in_urls(text)
        for match in _VALUE.finditer(text) if opaque else ():
            if match[0] in opaque:
                named = _kind_by_name(match[0], text[max(0, match.start() - 80) : match.start()])
                if named is not None:
                    yield match[0], named


def in_address(uri: str) -> Iterator[tuple[str, str]]:
    """Yield parts of a path or query that are tokens rather than names, ids or digests."""
    for part in re.split("[/?&= ]", uri):
        if len(part) >= 16 and not _ID.fullmatch(part) and looks_random(part):
            yield part, "a token in an address"


_ID: Final = re.compile(
    r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|sha256[:-][0-9a-f]{64}"
    r"|(?:file|thread|asst|batch|resp|vs|msg|run|step|chatcmpl|ftjob|upload|conv|call|fc|eval|session|job|model)[_-]\w+",
    re.IGNORECASE,
)


def looks_random(text: str, share: float = 0.15) -> bool:
    """Return whether a text changes between small letters, capitals and digits as often as no words do.

    Args:
        text: without spaces.
        share: how many of the characters begin a change.
    """
    classes = _CAPITALISED.sub("a", text)
    return len(_CHANGE.findall(classes)) >= max(3, len(text) * share)


_CAPITALISED: Final = re.compile(r"[A-Z][a-z]{2,}")
_CHANGE: Final = re.compile(r"[a-z](?=[A-Z0-9])|[A-Z](?=[a-z0-9])|[0-9](?=[A-Za-z])")


def is_placeholder(password: str) -> bool:
    """Return whether a password is one of those that documentation uses."""
    return bool(_PLAIN_PASSWORD.fullmatch(password) or _PLACEHOLDER.search(password))


def _patterns_for(text: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield the patterns that may occur: looking for a fixed text is much faster than a search for a pattern."""
    for kind, prefixes in _PREFIXES.items():
        for prefix in prefixes.split():
            if prefix in text:
                yield kind, _compiled(rf"{re.escape(prefix)}(?P<body>[\w.+/=~-]{{16,}})")
    for kind, needle, pattern in _FORMS:
        if needle in text:
            yield kind, _compiled(pattern)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9])(?:{pattern})", re.ASCII)


def _in_urls(text: str) -> Iterator[tuple[str, str]]:
    for match in _URL.finditer(text):
        user, password = match.groups()
        if password and password != user and not is_placeholder(password):
            yield password, "the password of a URL"
        elif not password and len(user) >= 16 and looks_random(user):
            yield user, "the key of a URL"


def _kind_by_name(value: str, before: str) -> str | None:
    """Return what a value is by the name before it; None if that does not say that it is a secret."""
    before = before.lower()
    found = _NAMED.search(before) if _STEM.search(before) else None
    if found is None:
        return None
    kind = list(_NAMES)[(found.lastindex or 1) - 1]
    return kind if kind != "a login" or _is_login(value) else None


def is_opaque(text: str) -> bool:
    """Return whether a text looks random, and no documentation would write it."""
    return looks_random(text) and not _PLACEHOLDER.search(text)


def _is_login(text: str) -> bool:
    """Return whether a text is `user:password` in base64."""
    try:
        user, colon, password = base64.b64decode(text).decode().partition(":")
    except ValueError:
        return False
    return bool(colon) and user.isprintable() and password.isprintable() and not is_placeholder(password)
