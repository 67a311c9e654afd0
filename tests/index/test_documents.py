"""Readers: what each format gives, and that what cannot be read is refused with a reason."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index import Document, DocumentError, UnsupportedFormat, find_files, read_documents
from index.documents import UploadedAs, file_id
from index.formats.parsed import clean


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_one(path: Path) -> Document:
    (document,) = read_documents(path)
    return document


def refusal(path: Path) -> str:
    with pytest.raises(DocumentError) as caught:
        list(read_documents(path))
    assert caught.value.path == path
    return caught.value.reason


def headings(document: Document) -> list[str]:
    return [section.heading for section in document.sections]


# Plain text and Markdown


def test_plain_text_is_one_section_titled_by_its_file_name(tmp_path):
    document = read_one(write(tmp_path / "notes.txt", "one\r\ntwo\n\nthree"))
    assert (document.title, document.text) == ("notes", "one\ntwo\n\nthree")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_reads_the_same_in_every_encoding_that_names_itself(tmp_path, encoding):
    assert read_one(write(tmp_path / "a.txt", "Zoë – 東京".encode(encoding))).text == "Zoë – 東京"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html"])
def test_binary_data_under_a_text_name_is_refused(tmp_path, name):
    assert "binary" in refusal(write(tmp_path / name, b"\x7fELF\x00\x00text"))


def test_text_that_is_not_utf8_is_refused_with_the_way_to_convert_it(tmp_path):
    reason = refusal(write(tmp_path / "a.txt", "Zoë".encode("latin1")))
    assert "byte 2" in reason and "iconv" in reason


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.pdf", "a.docx", "a.json", "a.jsonl"])
def test_an_empty_file_of_any_format_is_refused(tmp_path, name):
    assert "is empty" in refusal(write(tmp_path / name, b""))


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", " \n "), ("a.html", "<p> </p><!-- x -->"), ("a.json", "[]"), ("a.jsonl", "\n\n")]
)
def test_a_file_without_any_text_is_refused(tmp_path, name, content):
    assert "no text" in refusal(write(tmp_path / name, content))


def test_markdown_headings_of_both_styles_become_sections_but_those_in_code_do_not(tmp_path):
    text = "intro\n\n# One\na\n```\n# not one\n```\n\nTwo\n---\nb\n## *Three*\n"
    document = read_one(write(tmp_path / "a.md", text))
    assert headings(document) == ["", "One", "Two", "*Three*"]
    assert "# not one" in document.sections[1].text
    assert document.title == "One"


def test_markdown_front_matter_names_the_title_and_is_not_text(tmp_path):
    document = read_one(write(tmp_path / "a.md", "---\ntitle: 'The title'\ntags: x\n---\n# One\na"))
    assert (document.title, document.text) == ("The title", "a")
    assert read_one(write(tmp_path / "b.md", "---\ntags: x\n---\na")).title == "b"


# HTML


def test_html_gives_the_text_a_browser_shows_in_sections(tmp_path):
    page = """<!doctype html><html><head><title> The  page </title><style>p {}</style></head><body>
      <nav>menu</nav><p>Intro <b>bold</b>\n text</p><!-- hidden -->
      <h2>First <i>part</i></h2><div>one<br>two</div><ul><li>x</li><li>y</li></ul>
      <pre>  kept\n    as is</pre><script>var a</script>
      <h2>Second</h2><table><tr><th>k</th><td>v</td></tr><tr><td>l</td><td>w</td></tr></table></body></html>"""
    document = read_one(write(tmp_path / "a.html", page))
    assert document.title == "The page"
    assert headings(document) == ["", "First part", "Second"]
    assert document.sections[0].text == "Intro bold text"
    assert document.sections[1].text == "one\ntwo\n\nx\ny\n\n  kept\n    as is"
    assert document.sections[2].text == "k\tv\nl\tw"


def test_html_is_decoded_as_the_page_declares(tmp_path):
    page = '<?xml version="1.0" encoding="iso-8859-1"?><html><head><meta charset="iso-8859-1"></head><p>Zoë</p></html>'
    document = read_one(write(tmp_path / "a.htm", page.encode("latin1")))
    assert (document.title, document.text) == ("a", "Zoë")


# PDF


def test_pdf_pages_become_sections_with_page_numbers_and_empty_pages_are_left_out(make_pdf):
    document = read_one(make_pdf(["First page."], [], ["Third page."], title="The title"))
    assert document.title == "The title"
    assert [(s.page, s.text) for s in document.sections] == [(1, "First page."), (3, "Third page.")]


def test_pdf_lines_that_the_layout_broke_are_joined(make_pdf):
    assert read_one(make_pdf(["The exam-", "ple goes", "on here.", "New line"])).text == (
        "The example goes on here.\nNew line"
    )


def test_a_pdf_without_a_text_layer_is_refused_with_ocr_as_remedy(make_pdf):
    assert "OCR" in refusal(make_pdf([]))


def test_an_encrypted_pdf_is_refused_unless_its_password_is_empty(make_pdf, tmp_path):
    from pypdf import PdfWriter

    for password, name in (("secret", "locked.pdf"), ("", "open.pdf")):
        writer = PdfWriter(clone_from=make_pdf(["Some text."]))
        writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
        writer.write(tmp_path / name)
    assert "encrypted" in refusal(tmp_path / "locked.pdf")
    assert read_one(tmp_path / "open.pdf").text == "Some text."


@pytest.mark.parametrize("name", ["a.pdf", "a.docx"])
def test_a_damaged_file_is_refused(tmp_path, make_pdf, name):
    write(tmp_path / name, make_pdf(["Some text."], name="whole.pdf").read_bytes()[:300])
    assert "cannot be parsed" in refusal(tmp_path / name)


# DOCX


def test_docx_headings_paragraphs_and_tables_come_in_reading_order(tmp_path):
    import docx

    file = docx.Document()
    file.core_properties.title = "The title"
    file.add_paragraph("Intro.")
    file.add_heading("First", level=1)
    file.add_paragraph("One.")
    table = file.add_table(rows=2, cols=2)
    for i, cell in enumerate(c for row in table.rows for c in row.cells):
        cell.text = f"cell {i}"
    table.cell(1, 0).merge(table.cell(1, 1))
    file.add_paragraph("Two.")
    file.add_heading("Second", level=2)
    file.add_paragraph("Three.")
    file.save(str(tmp_path / "a.docx"))
    document = read_one(tmp_path / "a.docx")
    assert document.title == "The title"
    assert headings(document) == ["", "First", "Second"]
    assert document.sections[1].text == "One.\n\ncell 0 | cell 1\ncell 2 cell 3\n\nTwo."


# JSON and JSONL

RECORDS = [
    {"id": "x", "title": "One", "text": "first", "year": 1961, "tags": ["a"], "ok": True, "none": None, "nan": 0.5},
    {"title": "Two", "text": "second"},
    {"id": 7, "text": "third\u2028line"},
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_records_become_documents_with_title_source_and_plain_metadata(tmp_path, name):
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS)
    write(tmp_path / name, json.dumps(RECORDS, indent=1) if name == "a.json" else f"\n{lines}\n")
    first, second, third = read_documents(tmp_path / name)
    assert (first.title, first.text, dict(first.metadata)) == ("One", "first", {"year": 1961, "ok": True, "nan": 0.5})
    assert [d.source.rpartition("#")[2] for d in (first, second, third)] == ["x", "2", "7"]
    assert (third.title, third.text) == ("", "third\nline")
    assert len({d.document_id for d in (first, second, third)}) == 3
    assert all(d.document_id.startswith(file_id(tmp_path / name) + "-") for d in (first, second, third))


def test_one_json_object_is_one_document(tmp_path):
    assert read_one(write(tmp_path / "a.json", ' {"title": "T", "text": "x"}')).title == "T"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ("[1]", "expected an object"),
        ('{"title": "T"}', "'text'"),
        ('{"text": 5}', "'text'"),
        ('{"text": "x", "title": 5}', "'title'"),
        ('{"text": "x", "id": true}', "'id'"),
        ('{"text": "x", "id": "ok"}', "used before, in line 1"),
        ('{"text": ', "malformed"),
    ],
)
def test_a_bad_record_is_refused_with_its_line_after_the_good_ones(tmp_path, name, record, fault):
    good = '{"id": "ok", "text": "good"}'
    write(tmp_path / name, f"[{good},\n{record}]" if name == "a.json" else f"{good}\n{record}\n")
    stream = read_documents(tmp_path / name)
    assert next(stream).text == "good"
    with pytest.raises(DocumentError, match="line 2") as caught:
        next(stream)
    assert fault in str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_nested_deeper_than_the_parser_can_follow_is_refused(tmp_path, name):
    assert "malformed" in refusal(write(tmp_path / name, "[" * 100_000))


@pytest.mark.parametrize("tail", ['{"text": "a"} {"text": "b"}]', '{"text": "a"}', '{"text": "a"}] x'])
def test_a_json_array_with_a_fault_of_syntax_is_refused(tmp_path, tail):
    refusal(write(tmp_path / "a.json", "[" + tail))


def test_bytes_that_are_not_utf8_in_jsonl_are_refused_with_their_line(tmp_path):
    assert "line 2" in refusal(write(tmp_path / "a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n'))


@given(
    texts=st.lists(st.text(min_size=1).filter(lambda t: clean(t).strip()), min_size=1, max_size=8), indent=st.booleans()
)
def test_a_json_array_streams_the_same_texts_whatever_the_block_size(texts, indent, tmp_path_factory):
    from index.formats import records

    path = write(
        tmp_path_factory.mktemp("json") / "a.json",
        json.dumps([{"text": t} for t in texts], indent=2 if indent else None),
    )
    with path.open(encoding="utf-8") as file:
        file.read(1)
        file_reads = iter(lambda: file.read(1), "")
        items = list(records._array_items(path, _ByOne(file_reads)))
    assert [item.value["text"] for item in items] == texts
    assert [d.text for d in read_documents(path)] == [clean(t).strip() for t in texts]


class _ByOne:
    """A text file that gives one character per read, however many are asked for."""

    def __init__(self, characters):
        self.characters = characters

    def read(self, _size):
        return next(self.characters, "")


# Any format


@given(st.text())
def test_clean_text_encodes_and_holds_no_control_characters_and_keeps_its_words(text):
    cleaned = clean(text)
    cleaned.encode()
    assert not any(ord(c) < 32 and c not in "\t\n" for c in cleaned)
    assert clean(cleaned) == cleaned


def test_a_lone_surrogate_in_json_does_no_harm(tmp_path):
    read_one(write(tmp_path / "a.jsonl", '{"id": "\\ud800", "text": "a\\ud800b\\u0000c"}')).content_hash  # noqa: B018


def test_ids_name_the_place_and_hashes_the_content(tmp_path, monkeypatch):
    first = read_one(write(tmp_path / "a.txt", "one"))
    monkeypatch.chdir(tmp_path)
    again = read_one(Path("a.txt"))
    changed = read_one(write(tmp_path / "a.txt", "two"))
    assert first.document_id == again.document_id == changed.document_id
    assert first.content_hash == again.content_hash != changed.content_hash
    assert read_one(write(tmp_path / "b.txt", "two")).document_id != changed.document_id


def test_an_upload_is_known_by_its_id_and_read_and_cited_by_its_name(tmp_path):
    (one,) = read_documents(write(tmp_path / "file-1", "x"), UploadedAs("file-1", "report.txt"))
    (two,) = read_documents(write(tmp_path / "file-2", '{"id": 7, "text": "y"}'), UploadedAs("file-2", "r.jsonl"))
    assert (one.document_id, one.title, one.source) == ("file-1", "report", "report.txt")
    assert (two.document_id.rpartition("-")[0], two.source) == ("file-2", "r.jsonl#7")
    with pytest.raises(UnsupportedFormat, match=r"'\.exe' is not supported"):
        list(read_documents(tmp_path / "file-1", UploadedAs("file-1", "a.exe")))


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.pdf", "a.json", "a.jsonl"])
def test_what_the_system_refuses_to_read_is_refused_with_its_reason(tmp_path, name):
    (tmp_path / name).mkdir()
    assert "Is a directory" in refusal(tmp_path / name)


# Finding files


def test_directories_are_walked_in_order_without_hidden_files_and_unknown_formats_are_reported(tmp_path):
    for name in ("b.txt", "a.md", ".hidden.txt", "sub/c.TXT", ".git/d.txt", "photo.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "x")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    found = find_files([tmp_path, tmp_path / "b.txt"])
    assert [p.relative_to(tmp_path).as_posix() for p in found.files] == ["a.md", "b.txt", "sub/c.TXT"]
    assert [p.name for p in found.unsupported] == ["photo.jpg"]


def test_a_file_of_unknown_format_named_directly_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"\.jpg.*\.docx"):
        find_files([write(tmp_path / "photo.jpg", "x")])
    with pytest.raises(UnsupportedFormat, match="without extension"):
        list(read_documents(write(tmp_path / "README", "x")))


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(DocumentError, match="no such file"):
        find_files([tmp_path / "missing"])


def test_every_real_passage_is_read(shared_data):
    path = shared_data / "wiki_passages.json"
    records = json.loads(path.read_text())
    documents = list(read_documents(path))
    assert [d.title for d in documents] == [clean(r["title"]).strip() for r in records]
    assert len({d.document_id for d in documents}) == len(records)
