"""Checks examples/kubernetes: schemas, the restricted Pod Security Standard, and what the objects
and the configuration say about each other."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import tomllib

import kustomize

# Oldest and newest release of Kubernetes whose schemas are checked.
VERSIONS = ["1.30", "1.37"]
CLUSTERS = [
    "base",
    "overlays/aws-irsa",
    "overlays/azure-workload-identity",
    "overlays/disk-cache",
    "overlays/gke-workload-identity",
    "overlays/minio-private-ca",
]
# Kinds that operators define, with the fields that may be used. custom.mjs checks their values, but
# not that there are no others.
CUSTOM = {
    ("cert-manager.io/v1", "Certificate"): {
        "secretName": str,
        "duration": str,
        "renewBefore": str,
        "privateKey": {"algorithm": str, "size": int, "rotationPolicy": str},
        "usages": [str],
        "dnsNames": [str],
        "issuerRef": {"group": str, "kind": str, "name": str},
    },
    ("monitoring.coreos.com/v1", "ServiceMonitor"): {
        "selector": {"matchLabels": dict},
        "endpoints": [{"port": str, "path": str, "interval": str}],
    },
}
# Options that differ between the base and the overlays.
OF_STORES = re.compile("store-|export-dir$")
# Environment that the platform of an overlay sets.
ENVIRONMENT = {
    "base": {"AWS_ACCESS_KEY_ID": "example", "AWS_SECRET_ACCESS_KEY": "example"},
    "disk-cache": {"AWS_ACCESS_KEY_ID": "example", "AWS_SECRET_ACCESS_KEY": "example"},
    "aws-irsa": {
        "AWS_ROLE_ARN": "arn:aws:iam::111122223333:role/hexz-nbd",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "{folder}/token",
    },
    "azure-workload-identity": {
        "AZURE_CLIENT_ID": "00000000-0000-0000-0000-000000000000",
        "AZURE_TENANT_ID": "00000000-0000-0000-0000-000000000000",
        "AZURE_FEDERATED_TOKEN_FILE": "{folder}/token",
        "AZURE_AUTHORITY_HOST": "https://login.microsoftonline.com/",
    },
}
GRACE = 5
OVERHEAD = 128


class Failure(Exception):
    """An example isn't as it should be."""


def expect(condition, what):
    if not condition:
        raise Failure(what)


def check(root, program, tools):
    """Checks the base and all overlays. Yields what was checked."""
    folder = root / "examples/kubernetes"
    found = {str(path.parent.relative_to(folder)) for path in folder.rglob("kustomization.yaml")}
    expect(found == set(CLUSTERS), f"other kustomizations than expected: {found}")
    base = None
    kubectl = shutil.which("kubectl")
    for name in CLUSTERS:
        objects = kustomize.render(folder / name)
        if kubectl:
            compare_with_kubectl(folder / name, objects)
        schemas(name, objects)
        operators(tools, name, objects)
        config = policies(name, objects)
        base = base or config
        of_stores = {key for key in config if OF_STORES.match(key)}
        same = {key: value for key, value in config.items() if key not in of_stores}
        expected = {key: value for key, value in base.items() if not OF_STORES.match(key)}
        expect(same == expected, f"{name}: options differ from the base that aren't of stores")
        check_configuration(program, name, objects)
        yield f"{name}: {len(objects)} objects" + (", as kubectl renders them" if kubectl else "")


def compare_with_kubectl(folder, objects):
    command = ["kubectl", "kustomize", folder]
    rendered = subprocess.run(command, capture_output=True, text=True, check=False)
    expect(rendered.returncode == 0, f"kubectl kustomize: {rendered.stderr}")
    theirs = [*kustomize.yaml.load_all(rendered.stdout, kustomize.UniqueLoader)]
    expect(normal(theirs) == normal(objects), f"{folder}: kubectl kustomize renders it differently")


def normal(value):
    """Returns a form that doesn't depend on the order of lists."""
    if isinstance(value, dict):
        return {key: normal(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted(
            (normal(item) for item in value), key=lambda it: json.dumps(it, sort_keys=True)
        )
    return value


def schemas(name, objects):
    import kubernetes_validate

    for item in objects:
        custom = CUSTOM.get((item["apiVersion"], item["kind"]))
        if custom:
            expect(set(item) == {"apiVersion", "kind", "metadata", "spec"}, f"{name}: {item}")
            fits(f"{name}: {item['kind']}.spec", item["spec"], custom)
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(item, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                raise Failure(f"{name}: {item['kind']}, Kubernetes {version}: {error}") from error


def operators(tools, name, objects):
    """Checks the values of custom objects."""
    custom = [it for it in objects if (it["apiVersion"], it["kind"]) in CUSTOM]
    script = shutil.copy(pathlib.Path(__file__).parent / "custom.mjs", tools / "node")
    command, text = ["node", script], json.dumps(custom)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"{name}: {done.stderr}")


def fits(path, value, kind):
    if isinstance(kind, dict):
        for key in value:
            expect(key in kind, f"{path}: unexpected field {key}")
            fits(f"{path}.{key}", value[key], kind[key])
    elif isinstance(kind, list):
        expect(isinstance(value, list) and value, f"{path}: no list")
        for item in value:
            fits(path, item, kind[0])
    else:
        expect(isinstance(value, kind), f"{path}: {value} isn't a {kind.__name__}")


def one(objects, kind, name="hexz-nbd"):
    (item,) = [it for it in objects if it["kind"] == kind and it["metadata"]["name"] == name]
    return item


def policies(name, objects):
    """Checks what the objects say about each other. Returns the configuration."""

    def ensure(condition, what):
        expect(condition, f"{name}: {what}")

    deployment = one(objects, "Deployment")
    template = deployment["spec"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    (container,) = pod["containers"]
    config = tomllib.loads(one(objects, "ConfigMap")["data"]["hexz-nbd.toml"])

    # The restricted Pod Security Standard, and more.
    of_pod, of_container = pod["securityContext"], container["securityContext"]
    ensure(of_pod["runAsNonRoot"] is True and of_pod["runAsUser"] == 10809, "it runs as root")
    ensure(of_pod["runAsGroup"] == of_pod["fsGroup"] == 10809, "wrong group")
    ensure(of_pod["seccompProfile"] == {"type": "RuntimeDefault"}, "no seccomp profile")
    ensure(
        of_container
        == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "the container has privileges",
    )
    for key in ("hostNetwork", "hostPID", "hostIPC", "initContainers"):
        ensure(key not in pod, f"unexpected {key}")
    ensure(pod["automountServiceAccountToken"] is False, "it has a token of the API")
    ensure(
        pod["serviceAccountName"] == one(objects, "ServiceAccount")["metadata"]["name"], "account"
    )
    for volume in pod["volumes"]:
        kinds = {"emptyDir"} if volume["name"] == "disk-cache" else {"configMap", "secret"}
        ensure(set(volume) <= {"name", *kinds}, f"volume {volume['name']}")
        if "secret" in volume:
            ensure(volume["secret"]["defaultMode"] == 0o440, f"permissions of {volume['name']}")
    namespace = one(objects, "Namespace")["metadata"]
    ensure(namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted", "namespace")
    for item in objects:
        if item["kind"] != "Namespace":
            ensure(item["metadata"]["namespace"] == namespace["name"], f"{item['kind']}: namespace")

    # The image's user, and its only program.
    ensure(container["args"][:2] == ["--config", "/etc/hexz-nbd/hexz-nbd.toml"], "arguments")
    ensure(re.fullmatch(r"[^:]+:[0-9.]+", container["image"]), "the image has no fixed version")

    # Selectors.
    selected = {"app.kubernetes.io/name": "hexz-nbd"}
    ensure(selected.items() <= labels.items(), "labels")
    ensure(deployment["spec"]["selector"] == {"matchLabels": selected}, "selector")
    budget = one(objects, "PodDisruptionBudget")["spec"]
    ensure(budget == {"maxUnavailable": 1, "selector": {"matchLabels": selected}}, "budget")
    for spread in pod["topologySpreadConstraints"]:
        ensure(spread["labelSelector"] == {"matchLabels": selected}, "topology spread constraints")
    policy = one(objects, "NetworkPolicy")["spec"]
    ensure(policy["podSelector"] == {"matchLabels": selected}, "selector of the network policy")
    services = [item for item in objects if item["kind"] == "Service"]
    for service in services:
        ensure(service["spec"]["selector"] == selected, "selector of a service")

    # Ports: of the configuration, the container, the services and the network policy.
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for key, port in (("listen", ports["nbd"]), ("monitor", ports["monitor"])):
        ensure(config[key] == f"0.0.0.0:{port}", f"{key} and the port {port}")
    offered = {port["targetPort"]: port["port"] for it in services for port in it["spec"]["ports"]}
    ensure(offered == ports, "ports of the services")
    admitted = [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
    ensure(sorted(admitted) == sorted(ports.values()), "ports of the network policy")
    ensure(all(rule.get("from") for rule in policy["ingress"]), "anyone may connect")
    ensure(policy["policyTypes"] == ["Ingress", "Egress"], "types of the network policy")
    leaving = {
        (port["protocol"], port["port"]) for rule in policy["egress"] for port in rule["ports"]
    }
    endpoint = config.get("store-endpoint", "https://")
    store = int(re.search(r":(\d+)$", endpoint).group(1)) if endpoint[8:] else 443
    ensure({("UDP", 53), ("TCP", 53), ("TCP", store)} <= leaving, "DNS or the store")
    ensure((("TCP", 80) in leaving) == (config.get("store-credentials") == "instance"), "metadata")
    monitor = one(objects, "ServiceMonitor")["spec"]
    chosen = monitor["selector"]["matchLabels"].items()
    (matching,) = [it for it in services if chosen <= it["metadata"]["labels"].items()]
    (endpoint,) = monitor["endpoints"]
    ensure(endpoint["port"] in [port["name"] for port in matching["spec"]["ports"]], "monitor")

    # Probes.
    for probe, path in (
        ("readinessProbe", "/readyz"),
        ("livenessProbe", "/healthz"),
        ("startupProbe", "/healthz"),
    ):
        ensure(container[probe]["httpGet"] == {"path": path, "port": "monitor"}, probe)

    # Memory and times.
    size = int(re.fullmatch(r"(\d+)GiB", config["cache-size"]).group(1)) * 1024
    memory = f"{size + OVERHEAD}Mi"
    resources = container["resources"]
    ensure(resources["requests"]["memory"] == resources["limits"]["memory"] == memory, "memory")
    ensure("cpu" not in resources["limits"], "a limit of processor time")
    shutdown = int(config["shutdown-timeout"].removesuffix("s"))
    before = int(config["drain-delay"].removesuffix("s"))
    ensure(pod["terminationGracePeriodSeconds"] == before + shutdown + GRACE, "grace period")

    # Every file of the configuration is in a mounted volume.
    mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    for mount in mounted.values():
        is_read_only = mount.get("readOnly") is True
        ensure(is_read_only != (mount["name"] == "disk-cache"), f"mount {mount['name']}")
        ensure("subPath" not in mount, f"mount {mount['name']}")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    if "disk-cache" in volumes:
        # The volume has to hold the cache and some small files.
        cache = container["args"][container["args"].index("--disk-cache-size") + 1]
        reserved = f"{int(cache.removesuffix('GiB')) + 1}Gi"
        ensure(volumes["disk-cache"]["emptyDir"]["sizeLimit"] == reserved, "size of the volume")
        ensure(resources["limits"]["ephemeral-storage"] == reserved, "ephemeral storage")
    maps = {it["metadata"]["name"]: it["data"] for it in objects if it["kind"] == "ConfigMap"}
    for key, value in config.items():
        if isinstance(value, str) and value.startswith("/"):
            folder, file = value.rsplit("/", 1)
            ensure(folder in mounted, f"{key}: nothing is mounted at {folder}")
            volume = volumes[mounted[folder]["name"]]
            if "configMap" in volume:
                ensure(file in maps[volume["configMap"]["name"]], f"{key}: no {file}")
    certificate = one(objects, "Certificate")["spec"]
    ensure(certificate["secretName"] == volumes["tls"]["secret"]["secretName"], "certificate")
    ensure("server auth" in certificate["usages"], "usage of the certificate")
    service = f"hexz-nbd.{namespace['name']}.svc"
    ensure(service in certificate["dnsNames"], "name of the certificate")
    ensure(config["watch"] is True and "tls-client-ca" in config, "configuration")
    return config


def check_configuration(program, name, objects):
    """Runs --check-config without a network: the only problem may be that the store can't be
    reached."""
    config = one(objects, "ConfigMap")["data"]["hexz-nbd.toml"]
    with tempfile.TemporaryDirectory(prefix="hexz-nbd-examples-") as temporary:
        folder = pathlib.Path(temporary)
        for words in (["init"], ["server", "nbd.example.org"]):
            command = [program, "pki", *words]
            subprocess.run(command, cwd=folder, capture_output=True, check=True)
        files = folder / "pki/servers/nbd.example.org"
        (folder / "token").write_text("not a token\n")
        (folder / "credentials").write_text(
            "[default]\naws_access_key_id = example\naws_secret_access_key = example\n"
        )
        for place, file in (
            ("/etc/hexz-nbd-tls/tls.crt", files / "server-cert.pem"),
            ("/etc/hexz-nbd-tls/tls.key", files / "server-key.pem"),
            ("/etc/hexz-nbd-client-ca/ca.crt", folder / "pki/ca-cert.pem"),
            ("/etc/hexz-nbd-store-ca/ca.crt", folder / "pki/ca-cert.pem"),
            ("/etc/hexz-nbd-store/credentials", folder / "credentials"),
        ):
            config = config.replace(f'"{place}"', f'"{file}"')
        expect("/etc/" not in config, f"{name}: {config}")
        path = folder / "hexz-nbd.toml"
        path.write_text(config)
        environment = ENVIRONMENT.get(name.rpartition("/")[2], {})
        environment = {key: text.format(folder=folder) for key, text in environment.items()}
        for offline in (True, False):
            command = [program, "--config", path, "--check-config"]
            if offline:
                # No service of this network may be asked for credentials.
                command = ["unshare", "--user", "--map-root-user", "--net", *command]
                path.write_text(f'store-timeout = "2s"\n{config}')
            else:
                # With a folder instead of the store, nothing is left to complain about.
                local = re.sub(r"(?m)^(store-.*\n|export-dir = .*)", "", config)
                path.write_text(f'export-dir = "{folder}"\n{local}')
            environment["PATH"] = os.environ["PATH"]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            lines = [json.loads(line) for line in done.stderr.splitlines()]
            errors = sorted({line["reason"] for line in lines if line["level"] != "INFO"})
            # There may be others, about connections.
            errors = [reason for reason in errors if not reason.startswith("store_")]
            wanted = ([3], ["folder_store"]) if offline else ([0], [])
            expect(([done.returncode], errors) == wanted, f"{name}: --check-config: {done}")


# Changes that the checks have to reject: path in the object, and the value.
WRONG = [
    ("Deployment", "spec.template.spec.securityContext.runAsUser", 0),
    ("Deployment", "spec.template.spec.containers.0.securityContext.privileged", True),
    ("Deployment", "spec.template.spec.containers.0.readinessProbe.httpGet.path", "/"),
    ("Deployment", "spec.template.spec.containers.0.ports.0.containerPort", 10808),
    ("Deployment", "spec.template.spec.containers.0.resources.limits.memory", "1Gi"),
    ("Deployment", "spec.template.spec.containers.0.volumeMounts.1.mountPath", "/etc/tls"),
    ("Deployment", "spec.template.spec.terminationGracePeriodSeconds", 10),
    ("Deployment", "spec.template.spec.hostNetwork", True),
    ("Deployment", "spec.replicas", "three"),
    ("Deployment", "spec.template.spec.containers.0.livenessProbes", {}),
    ("Service", "spec.ports.0.port", 443),
    ("PodDisruptionBudget", "spec.selector.matchLabels", {"app": "hexz-nbd"}),
    ("NetworkPolicy", "spec.ingress.0.ports.0.port", 10810),
    ("NetworkPolicy", "spec.ingress.1.from", []),
    ("NetworkPolicy", "spec.egress", []),
    ("Certificate", "spec.secretName", "other"),
    ("Certificate", "spec.organization", "example"),
    ("ServiceMonitor", "spec.endpoints.0.port", "nbd"),
]


def check_that_mistakes_are_found(root, _program, _tools):
    """Applies each change to the objects of the base, and checks that it is rejected."""
    for kind, path, value in WRONG:
        objects = kustomize.render(root / "examples/kubernetes/base")
        *way, last = path.split(".")
        item = one(objects, kind)
        for step in way:
            item = item[int(step)] if isinstance(item, list) else item[step]
        item[last] = value
        try:
            schemas("base", objects)
            policies("base", objects)
        except (Failure, KeyError, ValueError):
            continue
        raise Failure(f"{kind} {path} = {value} isn't rejected")
    yield f"{len(WRONG)} mistakes are found"
