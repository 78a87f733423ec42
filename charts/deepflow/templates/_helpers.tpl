{{/* Names, labels and parts that several templates share. */}}

{{- define "deepflow.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that selectors use: (dict "root" $ "component" "gateway"). */}}
{{- define "deepflow.selector" -}}
app.kubernetes.io/name: deepflow
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "deepflow.labels" -}}
{{ include "deepflow.selector" . }}
app.kubernetes.io/part-of: deepflow
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* metadata of an object: (dict "root" $ "component" "gateway" "name" "x" "annotations" (dict) "cluster" false). */}}
{{- define "deepflow.metadata" -}}
name: {{ .name }}
{{- if not .cluster }}
namespace: {{ .root.Release.Namespace }}
{{- end }}
labels:
  {{- include "deepflow.labels" . | nindent 2 }}
{{- $annotations := merge (dict) (default (dict) .annotations) .root.Values.commonAnnotations }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* (dict "root" $ "repository" "deepflow/control") */}}
{{- define "deepflow.image" -}}
{{- $tag := default .root.Chart.AppVersion .root.Values.image.tag -}}
{{- $name := printf "%s:%s" .repository $tag -}}
{{- if regexMatch "(@sha256:[0-9a-f]{64}|:[^/]+)$" .repository -}}{{- $name = .repository -}}{{- end -}}
{{- with .root.Values.image.registry }}{{ . }}/{{ end }}{{ $name }}
{{- end -}}

{{- define "deepflow.control" -}}
image: {{ include "deepflow.image" (dict "root" . "repository" .Values.image.control) }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end -}}

{{- define "deepflow.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The restricted profile: what every pod of ours says. */}}
{{- define "deepflow.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "deepflow.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- define "deepflow.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "deepflow.tokenSecret" -}}
{{- default (printf "%s-token" (include "deepflow.fullname" .)) .Values.clusterToken.existingSecret -}}
{{- end -}}

{{- define "deepflow.redisSecret" -}}
{{- default (printf "%s-valkey" (include "deepflow.fullname" .)) (default .Values.valkey.existingSecret .Values.redis.existingSecret) -}}
{{- end -}}

{{- define "deepflow.tlsSecret" -}}
{{- default (printf "%s-tls" (include "deepflow.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{/* Where certificates lie in each container; none without TLS. */}}
{{- define "deepflow.tlsEnv" -}}
{{- if .Values.tls.enabled -}}
- {name: DEEPFLOW_TLS_DIR, value: /etc/deepflow/tls}
{{- end -}}
{{- end -}}

{{- define "deepflow.tlsMount" -}}
{{- if .Values.tls.enabled -}}
- {name: tls, mountPath: /etc/deepflow/tls, readOnly: true}
{{- end -}}
{{- end -}}

{{- define "deepflow.tlsVolume" -}}
{{- if .Values.tls.enabled -}}
- name: tls
  secret: {secretName: {{ include "deepflow.tlsSecret" . }}, defaultMode: 0440}
{{- end -}}
{{- end -}}

{{/* The Valkey's URL: (dict "root" $ "password" "x"). */}}
{{- define "deepflow.valkeyUrl" -}}
{{- $host := printf "%s-valkey:6379/0" (include "deepflow.fullname" .root) -}}
{{- if .root.Values.tls.enabled -}}
{{- $files := "ssl_ca_certs=/etc/deepflow/tls/ca.crt&ssl_certfile=/etc/deepflow/tls/tls.crt&ssl_keyfile=/etc/deepflow/tls/tls.key" -}}
{{- printf "rediss://:%s@%s?%s" .password $host $files -}}
{{- else -}}
{{- printf "redis://:%s@%s" .password $host -}}
{{- end -}}
{{- end -}}

{{- define "deepflow.credentials" -}}
- name: DEEPFLOW_CLUSTER_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "deepflow.tokenSecret" . }}, key: {{ .Values.clusterToken.key }}}}
- name: REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ include "deepflow.redisSecret" . }}, key: {{ .Values.redis.key }}}}
{{- end -}}

{{/* Checks that a schema cannot make. Included once. */}}
{{- define "deepflow.check" -}}
{{- if and .Values.valkey.enabled .Values.redis.existingSecret -}}
{{- fail "redis.existingSecret names a server of your own: set valkey.enabled to false" -}}
{{- end -}}
{{- if not (or .Values.valkey.enabled .Values.redis.existingSecret) -}}
{{- fail "no Valkey and no Redis: set valkey.enabled, or redis.existingSecret to a secret with a URL" -}}
{{- end -}}
{{- if and .Values.tls.existingSecret .Values.tls.certManager.issuerRef -}}
{{- fail "tls: existingSecret and certManager.issuerRef exclude each other" -}}
{{- end -}}
{{- $seen := dict -}}
{{- range .Values.warmPools -}}
{{- if hasKey $seen .name -}}{{- fail (printf "warmPools: two are named %s" .name) -}}{{- end -}}
{{- $_ := set $seen .name true -}}
{{- end -}}
{{- if and (or .Values.metrics.serviceMonitor.enabled) (not .Values.gateway.openMetrics) -}}
{{- fail "metrics.serviceMonitor reads the gateways' /metrics without a key: set gateway.openMetrics too" -}}
{{- end -}}
{{- if and .Values.gateway.autoscaling.enabled (gt (int .Values.gateway.autoscaling.minReplicas) (int .Values.gateway.autoscaling.maxReplicas)) -}}
{{- fail "gateway.autoscaling: minReplicas exceeds maxReplicas" -}}
{{- end -}}
{{- end -}}

{{/* TCP ports as a rule's list. */}}
{{- define "deepflow.ports" -}}
{{- $ports := list -}}
{{- range . -}}
{{- $ports = append $ports (dict "port" . "protocol" "TCP") -}}
{{- end -}}
{{- toJson $ports -}}
{{- end -}}

{{/* Egress to the Valkey of the chart, or to wherever the Redis of one's own is. */}}
{{- define "deepflow.redisEgress" -}}
{{- if .Values.valkey.enabled -}}
- to:
    - podSelector:
        matchLabels:
          {{- include "deepflow.selector" (dict "root" . "component" "valkey") | nindent 10 }}
  ports: [{port: valkey}]
{{- else -}}
- ports: [{port: {{ .Values.networkPolicies.redisPort }}, protocol: TCP}]
{{- end -}}
{{- end -}}
