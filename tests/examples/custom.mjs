// Validates objects of operators, which come as JSON on standard input. The packages don't reject
// unknown fields; cluster.py does.
import { readFileSync } from "node:fs";
import { Certificate } from "@kubernetes-models/cert-manager/cert-manager.io/v1/Certificate";
import { ServiceMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor";

const kinds = { Certificate, ServiceMonitor };
for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  new kinds[object.kind](object).validate();
}
