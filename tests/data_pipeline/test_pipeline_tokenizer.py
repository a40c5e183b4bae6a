"""The codegen tokenizer against known ids, and documents that try to forge special tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tokens.tokenizer import (
    END_OF_TEXT,
    DocumentTokenizer,
    build_codegen,
    load_tokenizer,
)

CODEGEN = load_tokenizer("codegen")
PLAIN = DocumentTokenizer(build_codegen(), "codegen", END_OF_TEXT, fast=False)

# From the tokenizer.json that is published with phi-2, which has phi-1's tokenizer.
KNOWN_IDS = {
    "Hello world": [15496, 995],
    "def f(x):\n    return x + 1\n": [
        *(4299, 277, 7, 87, 2599, 198),
        *(50284, 7783, 2124, 1343, 352, 198),
    ],
    " " * 40: [50257, 50279],
    " " * 31: [50257],
    "  ": [50286],
    "\t" * 9: [50287],
    "\t\t": [50294],
    "": [],
}


@pytest.mark.parametrize("tokenizer", [CODEGEN, PLAIN], ids=["chosen", "tokenizers"])
def test_known_ids(tokenizer: DocumentTokenizer) -> None:
    found = tokenizer.encode_batch(list(KNOWN_IDS))
    assert [ids.tolist() for ids in found] == list(KNOWN_IDS.values())
    assert all(ids.dtype == np.uint16 for ids in found)


def test_the_size_and_the_end_are_those_of_codegen() -> None:
    assert (CODEGEN.vocab_size, CODEGEN.eod_id) == (50295, 50256)


def test_the_fast_backend_is_used_and_says_why() -> None:
    pytest.importorskip("gigatoken")
    assert CODEGEN.backend == "gigatoken"
    assert "same ids" in CODEGEN.backend_reason
    assert PLAIN.backend == "tokenizers"


def test_a_backend_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gigatoken = pytest.importorskip("gigatoken")
    from_json = gigatoken.Tokenizer.from_json

    def other_from_json(text: str) -> Any:
        wrong = tokenizers.Tokenizer.from_str(text)
        wrong.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        return from_json(wrong.to_str())

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", other_from_json)
    fallen_back = load_tokenizer("codegen")
    assert fallen_back.backend == "tokenizers"
    assert "other ids" in fallen_back.backend_reason
    assert fallen_back.encode_batch(["Hello world"])[0].tolist() == [15496, 995]


INJECTIONS = [
    END_OF_TEXT,
    f"a{END_OF_TEXT}b",
    f"{END_OF_TEXT * 3}\n    {END_OF_TEXT}  ",
    f"x = '{END_OF_TEXT}'\n",
    "<|endoftext|",
    "<|im_start|>system<|im_end|><|fim_prefix|><fim_middle></s><s>[INST]",
]


@pytest.mark.parametrize("tokenizer", [CODEGEN, PLAIN], ids=["chosen", "tokenizers"])
def test_no_document_holds_a_special_id(tokenizer: DocumentTokenizer) -> None:
    batch = [*INJECTIONS, "plain between", *reversed(INJECTIONS)]
    encoded = tokenizer.encode_batch(batch)
    assert len(encoded) == len(batch)
    for text, ids in zip(batch, encoded, strict=True):
        assert tokenizer.eod_id not in ids.tolist()
        assert tokenizer.decode(ids) == text
    # The same text through the library's default does forge a border: the test can see one.
    default = build_codegen()
    assert tokenizer.eod_id in default.encode(INJECTIONS[1]).ids


def test_a_renewed_backend_gives_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [ids.tolist() for ids in PLAIN.encode_batch(list(KNOWN_IDS))]
    monkeypatch.setattr("data_pipeline.tokens.tokenizer.RENEW_BYTES", 100)
    renewing = load_tokenizer("codegen")
    for _ in range(3):
        assert [ids.tolist() for ids in renewing.encode_batch(list(KNOWN_IDS))] == expected
    assert renewing.backend == CODEGEN.backend


code_like = st.text(
    st.one_of(
        st.sampled_from(" \t\n\r\"'#()<|>endoftextreturn0123_"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=200,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(code_like, max_size=4))
def test_both_backends_agree_and_decoding_gives_the_text_back(texts: list[str]) -> None:
    fast, slow = CODEGEN.encode_batch(texts), PLAIN.encode_batch(texts)
    assert [ids.tolist() for ids in fast] == [ids.tolist() for ids in slow]
    assert [CODEGEN.decode(ids) for ids in fast] == texts


def test_a_surrogate_is_an_error_of_one_line() -> None:
    with pytest.raises(ValueError, match="half a character"):
        CODEGEN.encode_batch(["fine", "\ud800"])


def test_a_saved_tokenizer_is_the_same_one_here_and_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    CODEGEN.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.sha256, loaded.eod_id, loaded.vocab_size) == (CODEGEN.sha256, 50256, 50295)
    assert load_tokenizer(tmp_path / "saved" / "tokenizer.json").sha256 == CODEGEN.sha256
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(auto) == 50295
    assert (auto.eos_token_id, auto.bos_token_id, auto.unk_token_id) == (50256,) * 3
    assert auto.model_max_length == 2048
    for text, ids in KNOWN_IDS.items():
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids) == text


def test_the_hash_sees_what_decides_the_ids_and_not_the_layout(tmp_path: Path) -> None:
    CODEGEN.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in value["model"]["merges"]
    ]
    value["truncation"] = {
        "direction": "Right",
        "max_length": 7,
        "stride": 0,
        "strategy": "LongestFirst",
    }
    path.write_text(json.dumps(value, indent=3, sort_keys=True))
    assert load_tokenizer(tmp_path).sha256 == CODEGEN.sha256
    assert len(load_tokenizer(tmp_path).encode_batch(["x y " * 50])[0]) > 7
    value["model"]["merges"][100:102] = value["model"]["merges"][101:99:-1]
    path.write_text(json.dumps(value))
    assert load_tokenizer(tmp_path).sha256 != CODEGEN.sha256


def test_unfit_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        load_tokenizer("cogeden")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    bare.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="end-of-document"):
        load_tokenizer(tmp_path)
