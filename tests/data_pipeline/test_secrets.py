"""The scan for secrets: planted ones are found and vanish, look-alikes and clean code are left."""

import ast
import os
import random
import string
import uuid
from pathlib import Path

import pytest

from data_pipeline.heuristics.secrets import PII_KINDS, count_kinds, redact, scan

LOWER, UPPER, DIGITS = string.ascii_lowercase, string.ascii_uppercase, string.digits
ALNUM = LOWER + UPPER + DIGITS
HEX = DIGITS + "abcdef"


def planted(seed: int) -> dict[str, str]:
    """One synthetic secret of each kind, drawn anew; formats as their issuers document them."""
    draw = random.Random(seed)

    def of(alphabet: str, size: int) -> str:
        return "".join(draw.choice(alphabet) for _ in range(size))

    body = "\n".join(of(ALNUM + "+/", 64) for _ in range(6))
    begin, end = "-----BEGIN {}PRIVATE KEY-----", "-----END {}PRIVATE KEY-----"
    return {
        "aws_access": "AKIA" + of(UPPER + DIGITS, 16),
        "github": "ghp_" + of(ALNUM, 36),
        "github_fine": "github_pat_" + of(ALNUM, 22) + "_" + of(ALNUM, 59),
        "gitlab": "glpat-" + of(ALNUM, 20),
        "slack": f"xoxb-{of(DIGITS, 12)}-{of(DIGITS, 12)}-{of(ALNUM, 24)}",
        "slack_hook": "https://hooks.slack.com/services/"
        + f"T{of(UPPER, 8)}/B{of(UPPER, 8)}/{of(ALNUM, 24)}",
        "stripe": "sk_live_" + of(ALNUM, 24),
        "google": "AIza" + of(ALNUM, 35),
        "google_oauth": "GOCSPX-" + of(ALNUM, 28),
        "openai": "sk-proj-" + of(ALNUM, 48),
        "openai_old": "sk-" + of(ALNUM, 20) + "T3BlbkFJ" + of(ALNUM, 20),
        "huggingface": "hf_" + of(ALNUM, 34),
        "npm": "npm_" + of(ALNUM, 36),
        "pypi": "pypi-AgEIcHlwaS5vcmc" + of(ALNUM, 80),
        "sendgrid": f"SG.{of(ALNUM, 22)}.{of(ALNUM, 43)}",
        "mailchimp": of(HEX, 32) + "-us12",
        "telegram": f"{of('123456789', 9)}:AA{of(ALNUM, 33)}",
        "jwt": f"eyJ{of(ALNUM, 30)}.eyJ{of(ALNUM, 60)}.{of(ALNUM, 43)}",
        "azure": f"AccountKey={of(ALNUM, 86)}==",
        "digitalocean": "dop_v1_" + of(HEX, 64),
        "databricks": "dapi" + of(HEX, 32),
        "shopify": "shpat_" + of(HEX, 32),
        "rsa_key": f"{begin.format('RSA ')}\n{body}\n{end.format('RSA ')}",
        "pkcs8_key": f"{begin.format('')}\n{body}\n{end.format('')}",
        "openssh_key": f"{begin.format('OPENSSH ')}\n{body}\n{end.format('OPENSSH ')}",
        "basic_auth": f"postgres://svc:{of(LOWER, 5)}{of(DIGITS, 3)}{of(UPPER, 5)}@db.corp.io/x",
        "email": f"{of(LOWER, 7)}.{of(LOWER, 6)}@{of(LOWER, 9)}.com",
        "ipv4": f"{draw.randint(80, 90)}.{draw.randint(20, 250)}.{draw.randint(20, 250)}.77",
    }


def assigned(seed: int) -> dict[str, str]:
    """Secrets known by the name that they are assigned to: (line of code) by its value."""
    draw = random.Random(seed)

    def of(alphabet: str, size: int) -> str:
        return "".join(draw.choice(alphabet) for _ in range(size))

    aws, key, token = of(ALNUM + "+/", 40), of(ALNUM, 32), of(HEX, 40)
    password = of(LOWER, 4) + of(UPPER, 4) + of(DIGITS, 4) + "!"
    return {
        aws: f'aws_secret_access_key = "{aws}"',
        key: f"config['API_KEY'] = '{key}'",
        token: f'headers = {{"auth_token": "{token}"}}',
        password: f'connect(password="{password}")',
    }


@pytest.mark.parametrize("with_plugins", [False, True])
def test_planted_secrets_are_found_and_vanish(with_plugins: bool) -> None:
    if with_plugins:
        pytest.importorskip("detect_secrets")
    missed, total = [], 0
    for seed in range(25):
        cases = {value: f'VALUE = """{value}"""' for value in planted(seed).values()}
        for value, line in (cases | assigned(seed)).items():
            text = f"import os\n\n{line}\nprint('done')  # end\n"
            cleaned = redact(text, scan(text, with_plugins))
            total += 1
            if value.removeprefix("AccountKey=") in cleaned or value[8:24] in cleaned:
                missed.append(line.split("=")[0] + value[:6])
            else:
                ast.parse(cleaned)
                assert cleaned.startswith("import os\n")
                assert cleaned.endswith("# end\n")
    assert total == 25 * 32
    assert len(missed) <= 0.05 * total, missed


LOOK_ALIKES = [
    f"key = '{uuid.UUID(int=0x12345678123456781234567812345678)}'",
    "sha256 = 'b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9'",
    "revision = '4b825dc642cb6eb9a060e54bf8d69288fbee4904'",
    "password = os.environ['DB_PASSWORD']",
    "password = 'password'",
    "api_key = 'your-api-key-goes-here-1234'",
    "token = self.tokenizer.convert_ids_to_tokens",
    "url = 'https://user:password@example.com/path'",
    "author = 'someone@example.com'",
    "loss = weights@inputs.mean()",
    "host = '127.0.0.1'; other = '192.168.0.12'; mask = '255.255.255.0'",
    "__version__ = '1.2.3.4'",
    "oid = '1.3.6.1.5.5.7.3.1'",
    "x[1:2], y[::2], '12:30:45'",
    "secret_key = 'theCurrentUserPreferencesDialogWidget'",
    "secret_key_path = '/etc/app/keys/secret/production/current'",
    "// @app.route and sk-learn and task-scheduler-configuration-value",
]


@pytest.mark.parametrize("line", LOOK_ALIKES)
def test_look_alikes_are_left_alone(line: str) -> None:
    pytest.importorskip("detect_secrets")
    assert scan(line + "\n", True) == []


def test_the_standard_library_holds_few_secrets() -> None:
    pytest.importorskip("detect_secrets")
    files = sorted(Path(os.__file__).parent.rglob("*.py"))
    files = [f for f in files if "site-packages" not in f.parts][::8]
    flagged = []
    for path in files:
        text = path.read_text("utf-8", "replace")
        if any(kind not in PII_KINDS for kind in count_kinds(scan(text, True))):
            flagged.append(path.name)
    assert len(files) > 100
    assert len(flagged) <= 0.01 * len(files), flagged


def test_overlapping_findings_are_redacted_as_one() -> None:
    token = "ghp_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC2eF4hJ6"
    text = f"github_token = '{token}' # and {token}.\n"
    cleaned = redact(text, scan(text, False))
    assert cleaned == "github_token = '<KEY>' # and <KEY>.\n"
    assert scan(cleaned, False) == []
