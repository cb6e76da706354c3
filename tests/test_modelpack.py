"""A ModelPack: closed objects, raw layers, and every digest that of a real blob."""

from __future__ import annotations

import hashlib
import json

from pipelines import modelpack
from pipelines.modelpack import About, Layer

GGUF = Layer(name="tiny-Q8_0.gguf", sha256="a" * 64, size_bytes=3_500_000)
DOCUMENTS = (
    Layer(name="tiny-Q8_0.Modelfile", sha256="b" * 64, size_bytes=120),
    Layer(name="LICENSE", sha256="c" * 64, size_bytes=11_000),
)
ABOUT = About(
    name="tiny-Q8_0",
    source="hf:owner/Tiny",
    revision="d" * 40,
    license="apache-2.0",
    architecture="llama",
    parameters_count=3_410_176,
    quantization="Q8_0",
)


def pack(about: About = ABOUT) -> tuple[dict[str, object], dict[str, object]]:
    """Return config and manifest as data."""
    made = modelpack.pack(about, GGUF, DOCUMENTS)
    return json.loads(made.config), json.loads(made.manifest)


def test_the_weights_are_the_gguf_itself() -> None:
    """Not in a tar: it is the very blob that Ollama's manifest names."""
    _, manifest = pack()
    layers = manifest["layers"]

    assert isinstance(layers, list)
    assert layers[0] == {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": f"sha256:{'a' * 64}",
        "size": 3_500_000,
        "annotations": {"org.cncf.model.filepath": "tiny-Q8_0.gguf"},
    }
    assert [layer["mediaType"] for layer in layers[1:]] == [
        "application/vnd.cncf.model.doc.v1.raw"
    ] * 2
    names = [layer["annotations"]["org.cncf.model.filepath"] for layer in layers]
    assert names == ["tiny-Q8_0.gguf", "tiny-Q8_0.Modelfile", "LICENSE"]


def test_the_manifest_is_an_oci_image_manifest_of_a_model() -> None:
    """What runtimes look at: type of the artifact, and the config by its digest."""
    made = modelpack.pack(ABOUT, GGUF, DOCUMENTS)
    manifest = json.loads(made.manifest)

    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"] == {
        "mediaType": "application/vnd.cncf.model.config.v1+json",
        "digest": f"sha256:{hashlib.sha256(made.config).hexdigest()}",
        "size": len(made.config),
    }


def test_the_config_says_what_the_specification_lets_it_say() -> None:
    """Three closed objects; a raw layer's content is named by its own digest."""
    config, _ = pack()

    assert config == {
        "descriptor": {
            "name": "tiny-Q8_0",
            "family": "llama",
            "revision": "d" * 40,
            "licenses": ["apache-2.0"],
            "sourceURL": "https://huggingface.co/owner/Tiny",
        },
        "config": {
            "architecture": "llama",
            "format": "gguf",
            "paramSize": "3.41m",
            "quantization": "Q8_0",
        },
        "modelfs": {
            "type": "layers",
            "diffIds": [f"sha256:{letter * 64}" for letter in "abc"],
        },
    }


def test_a_directory_of_the_operators_has_no_address() -> None:
    """Where a `path:` source lies is nobody's business."""
    config, _ = pack(About(**{**vars(ABOUT), "source": "path:examples/tiny"}))

    assert "examples" not in json.dumps(config)


def test_equal_facts_give_equal_bytes() -> None:
    """No time, no random number: a release that is composed again has the same digests."""
    assert modelpack.pack(ABOUT, GGUF, DOCUMENTS) == modelpack.pack(ABOUT, GGUF, DOCUMENTS)
