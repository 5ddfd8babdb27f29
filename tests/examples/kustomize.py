"""Renders a kustomization, for machines without kustomize.

It knows the features that examples/kubernetes uses, and rejects all others: resources, namespace,
strategic merge patches, images, and configMapGenerator without hashes in names. Where kubectl is
installed, `check` in cluster.py compares the result with that of `kubectl kustomize`.
"""

import copy
import pathlib

import yaml

HEAD = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
FIELDS = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "patches",
    "configMapGenerator",
    "generatorOptions",
    "images",
}
# Lists that a strategic merge patch merges by a key. Patches replace all others.
MERGED_LISTS = {
    "containers": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "env": "name",
}
CLUSTER_KINDS = {"Namespace"}


class UniqueLoader(yaml.SafeLoader):
    """Rejects mappings with a key twice, of which others would silently take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{node.start_mark}: the key {key} is there twice")
        return super().construct_mapping(node, deep)


def load(path):
    """Returns the documents of a YAML file."""
    with open(path) as file:
        return [document for document in yaml.load_all(file, UniqueLoader) if document is not None]


def identity(item):
    return item["apiVersion"], item["kind"], item["metadata"]["name"]


def unknown(path, found, known):
    if extra := set(found) - set(known):
        raise ValueError(f"{path}: this renderer doesn't know {', '.join(sorted(extra))}")


def merge(target, patch, field=""):
    """Merges a strategic merge patch."""
    if isinstance(target, dict) and isinstance(patch, dict):
        for key, value in patch.items():
            if value is None or str(key).startswith("$"):
                raise ValueError(f"this renderer doesn't know deletions and directives: {key}")
            target[key] = merge(target[key], value, key) if key in target else value
        return target
    key = MERGED_LISTS.get(field)
    if isinstance(target, list) and isinstance(patch, list) and key:
        for item in patch:
            same = [other for other in target if other[key] == item[key]]
            if same:
                merge(same[0], item)
            else:
                target.append(item)
        return target
    return patch


def render(folder):
    """Returns the objects of a kustomization."""
    folder = pathlib.Path(folder)
    path = folder / "kustomization.yaml"
    (root,) = load(path)
    unknown(path, root, FIELDS)
    if {key: root.get(key) for key in HEAD} != HEAD:
        raise ValueError(f"{path}: no kustomization")
    objects = {}

    def add(item):
        if objects.setdefault(identity(item), item) is not item:
            raise ValueError(f"{path}: {identity(item)} is there twice")

    for name in root.get("resources", []):
        part = folder / name
        for item in render(part) if part.is_dir() else load(part):
            add(copy.deepcopy(item))
    for entry in root.get("patches", []):
        unknown(path, entry, {"path"})
        for patch in load(folder / entry["path"]):
            if identity(patch) not in objects:
                raise ValueError(f"{path}: {entry['path']} patches nothing")
            # The types of lists are those of built-in objects.
            merge(objects[identity(patch)], patch)
    options = root.get("generatorOptions", {})
    if root.get("configMapGenerator") and options != {"disableNameSuffixHash": True}:
        raise ValueError(f"{path}: this renderer doesn't add hashes to names")
    for entry in root.get("configMapGenerator", []):
        unknown(path, entry, {"name", "files", "behavior"})
        data = {}
        for name in entry["files"]:
            key, _, file = name.rpartition("=")
            data[key or pathlib.Path(file).name] = (folder / file).read_text()
        item = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": entry["name"]},
            "data": data,
        }
        match entry.get("behavior", "create"):
            case "create":
                add(item)
            case "merge":
                objects[identity(item)]["data"].update(data)
            case other:
                raise ValueError(f"{path}: this renderer doesn't know the behavior {other}")
    for image in root.get("images", []):
        unknown(path, image, {"name", "newName", "newTag"})
        for item in objects.values():
            pod = item.get("spec", {}).get("template", {}).get("spec", {})
            for container in pod.get("containers", []):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    if namespace := root.get("namespace"):
        for item in objects.values():
            if item["kind"] not in CLUSTER_KINDS:
                item["metadata"]["namespace"] = namespace
    return list(objects.values())
