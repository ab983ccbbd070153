{{- define "tokenmill.selector" -}}
app.kubernetes.io/name: tokenmill
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tokenmill.labels" -}}
{{ include "tokenmill.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "tokenmill.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* Where the model lies in the container. The revision is in the path, so a new one never overwrites a served one. */}}
{{- define "tokenmill.folder" -}}
/models/{{ .Values.model.repo | replace "/" "--" }}--{{ .Values.model.revision }}
{{- end }}

{{- define "tokenmill.claim" -}}
{{ .Values.model.existingClaim | default (printf "%s-model" .Release.Name) }}
{{- end }}

{{- /* TOML. A JSON scalar or list of them is TOML too, and unlike toToml it keeps whole numbers whole. */}}
{{- define "tokenmill.config" -}}
{{- $model := ternary (include "tokenmill.folder" .) "demo" (ne .Values.model.repo "") }}
{{- $server := dict "host" "0.0.0.0" "port" 8000 "drain_timeout_s" .Values.lifecycle.drainSeconds }}
{{- $ours := dict "server" $server "model" (dict "model" $model) }}
{{- $defaults := dict "server" (dict "served_model_name" (list (.Values.model.repo | default "demo"))) }}
{{- range $section, $options := merge $ours (deepCopy .Values.config) $defaults }}
[{{ $section }}]
{{- range $key, $value := $options }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{ end }}
{{- end }}

{{- define "tokenmill.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "tokenmill.pod" -}}
serviceAccountName: {{ .Release.Name }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}
