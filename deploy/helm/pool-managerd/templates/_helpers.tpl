{{- define "pm.name" -}}
{{- default .Release.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "pm.selector" -}}
app.kubernetes.io/name: pool-managerd
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pm.labels" -}}
{{ include "pm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "pm.serviceAccount" -}}
{{- if .Values.serviceAccount.name }}{{ .Values.serviceAccount.name }}{{ else if .Values.serviceAccount.create }}{{ include "pm.name" . }}{{ else }}default{{ end -}}
{{- end }}

{{- define "pm.image" -}}
{{- $i := .Values.image -}}
{{ $i.repository }}{{ if $i.digest }}@{{ $i.digest }}{{ else }}:{{ default .Chart.AppVersion $i.tag }}{{ end }}
{{- end }}

{{- /* A value as TOML. Helm's own toToml writes every number as a float, which the daemon refuses. */ -}}
{{- define "pm.toml" -}}
{{- if kindIs "map" . -}}
{ {{- $first := true -}}
{{- range $key, $value := . -}}{{- if not (kindIs "invalid" $value) -}}
{{- if not $first }},{{ end }} {{ $key | toJson }} = {{ include "pm.toml" $value }}{{ $first = false -}}
{{- end -}}{{- end }} }
{{- else if kindIs "slice" . -}}
[{{- range $i, $value := . }}{{ if $i }}, {{ end }}{{ include "pm.toml" $value }}{{ end -}}]
{{- else -}}
{{ . | toJson }}
{{- end -}}
{{- end }}

{{- /* The keys of a table, a line each. */ -}}
{{- define "pm.table" -}}
{{- range $key, $value := . -}}{{- if not (kindIs "invalid" $value) }}
{{ $key | toJson }} = {{ include "pm.toml" $value }}
{{- end -}}{{- end -}}
{{- end }}

{{- define "pm.auth" -}}{{ if .Values.auth.secretName }}yes{{ end }}{{- end }}
{{- define "pm.tls" -}}{{ if and .Values.tls.secretName .Values.api.expose }}yes{{ end }}{{- end }}
{{- define "pm.scheme" -}}{{ if include "pm.tls" . }}https{{ else }}http{{ end }}{{- end }}

{{- define "pm.grace" -}}
{{- $needed := add .Values.drain.preStopSeconds .Values.drain.leaseSeconds 15 -}}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds }}{{ $needed }}{{ else }}{{ int .Values.terminationGracePeriodSeconds }}{{ end -}}
{{- end }}

{{- /* Names that requests may carry as Host: of the services, and of each pod that has one. */ -}}
{{- define "pm.hosts" -}}
{{- $ns := .Release.Namespace -}}
{{- $hosts := list -}}
{{- range $name := list (include "pm.name" .) (printf "%s-nodes" (include "pm.name" .)) -}}
{{- $hosts = concat $hosts (list $name (printf "%s.%s" $name $ns) (printf "%s.%s.svc" $name $ns) (printf "%s.%s.svc.cluster.local" $name $ns)) -}}
{{- end -}}
{{- if eq .Values.kind "StatefulSet" -}}
{{- $name := include "pm.name" . -}}
{{- $most := int .Values.replicas -}}
{{- if ne .Values.autoscaling.type "none" }}{{ $most = int .Values.autoscaling.max }}{{ end -}}
{{- range $i := until $most -}}
{{- $hosts = concat $hosts (list (printf "%s-%d.%s-nodes.%s.svc" $name $i $name $ns) (printf "%s-%d.%s-nodes.%s.svc.cluster.local" $name $i $name $ns)) -}}
{{- end -}}
{{- end -}}
{{- concat $hosts (default list .Values.config.node.hosts) | toJson -}}
{{- end }}

{{- define "pm.config" -}}
[node]
profile = "cloud"
listen = "{{ if .Values.api.expose }}0.0.0.0{{ else }}127.0.0.1{{ end }}:{{ .Values.api.port }}"
probe_listen = "0.0.0.0:{{ .Values.api.probePort }}"
socket = "/run/pool-managerd/api.sock"
state_dir = "/var/lib/pool-managerd/state"
insecure = {{ or .Values.api.insecure (and (not .Values.api.expose) (not (include "pm.auth" .))) }}
shutdown_drain = "{{ int .Values.drain.leaseSeconds }}s"
shutdown_deadline = "{{ add .Values.drain.leaseSeconds 10 }}s"
hosts = {{ include "pm.hosts" . }}
{{- include "pm.table" (omit .Values.config.node "hosts") }}

[gpu]
{{- include "pm.table" .Values.config.gpu }}

[models]
cache_dir = "/var/cache/pool-managerd/models"
{{- $roots := default list .Values.config.models.roots }}
{{- if .Values.modelsHostPath }}{{ $roots = append $roots .Values.modelsHostPath | uniq }}{{ end }}
roots = {{ $roots | toJson }}
{{- include "pm.table" (omit .Values.config.models "roots") }}
{{- if include "pm.auth" . }}

[auth]
tokens_file = "/etc/pool-managerd/auth/tokens"
{{- end }}
{{- if include "pm.tls" . }}

[tls]
cert = "/etc/pool-managerd/tls/tls.crt"
key = "/etc/pool-managerd/tls/tls.key"
{{- end }}
{{- range $name, $engine := .Values.config.engines }}

[engines.{{ $name | toJson }}]
{{- include "pm.table" $engine }}
{{- end }}
{{- range .Values.config.pool }}

[[pool]]
{{- include "pm.table" . }}
{{- end }}
{{- end }}
