{{- define "cantata.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "cantata.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "cantata.labels" -}}
{{ include "cantata.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The arguments of cluster.serve.app:build. */}}
{{- define "cantata.args" -}}
{{- $args := omit (deepCopy .Values.config) "replicas" "gateways" -}}
{{- $engine := merge (dict "model_path" (printf "/models/%s" .Values.model.path)) (default dict $args.engine) -}}
{{- $gateway := omit (default dict $args.gateway) "max_in_flight_requests" "request_timeout_s" "conversation_date" "reasoning_effort" "harmony_constraint" "tool_arguments" "reasoning_wrap_up" "reserve_answer" "keep_alive_timeout_s" -}}
{{- if not $gateway.served_model_name -}}
{{- $_ := set $gateway "served_model_name" (base .Values.model.path) -}}
{{- end -}}
{{- toYaml (merge (dict "engine" $engine "gateway" $gateway) (omit $args "gateway")) -}}
{{- end -}}

{{/* What a running gateway takes over. */}}
{{- define "cantata.gatewayUserConfig" -}}
{{- toYaml (pick (default dict .Values.config.gateway) "max_in_flight_requests" "request_timeout_s" "conversation_date" "reasoning_effort" "harmony_constraint" "tool_arguments" "reasoning_wrap_up" "reserve_answer") -}}
{{- end -}}

{{/* Whole seconds for which requests may still run in gateways that stop. */}}
{{- define "cantata.gatewayDrainSeconds" -}}
{{- $seconds := 1800.0 -}}
{{- if hasKey .Values.config "gateway_drain_timeout_s" -}}
{{- $seconds = .Values.config.gateway_drain_timeout_s -}}
{{- end -}}
{{- ceil $seconds | int64 -}}
{{- end -}}

{{- define "cantata.serveConfig" -}}
http_options:
  host: 0.0.0.0
  port: 8000
  keep_alive_timeout_s: {{ default 120 (default dict .Values.config.gateway).keep_alive_timeout_s }}
grpc_options:
  port: 9000
  grpc_servicer_functions:
    - cluster.frontend.grpc_handlers.add_InferenceServicer_to_server
    - cluster.frontend.grpc_handlers.add_HealthServicer_to_server
applications:
  - name: cantata
    route_prefix: /
    import_path: cluster.serve.app:build
    external_scaler_enabled: true
    args:
      {{- include "cantata.args" . | nindent 6 }}
    # Beside args, where a change replaces nothing.
    deployments:
      - name: engine
        num_replicas: {{ default 1 .Values.config.replicas }}
        max_surge_percent: {{ .Values.engineSurgePercent }}
      - name: gateway
        num_replicas: {{ default 1 .Values.config.gateways }}
        user_config:
          {{- include "cantata.gatewayUserConfig" . | nindent 10 }}
{{- end -}}

{{/* What the pod templates of head and workers share. Takes (dict "root" $ "node" .Values.head or .Values.worker). */}}
{{- define "cantata.podSpec" -}}
automountServiceAccountToken: false
{{- with .root.Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .node.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .node.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .node.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .root.Values.securityContext.runAsUser }}
  fsGroup: {{ .root.Values.securityContext.fsGroup }}
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .node.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .node.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: model
    persistentVolumeClaim:
      claimName: {{ .root.Values.model.claimName }}
      readOnly: true
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {{ .node.sharedMemory }}
  {{- with .root.Values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Annotations and labels of the pods of head or workers. Takes the same. */}}
{{- define "cantata.podMetadata" -}}
labels:
  {{- include "cantata.labels" .root | nindent 2 }}
  {{- with .node.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .node.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What the containers of head and workers share. Takes the same. */}}
{{- define "cantata.container" -}}
{{- if .root.Values.image.digest }}
image: {{ printf "%s@%s" .root.Values.image.repository .root.Values.image.digest | quote }}
{{- else }}
image: {{ printf "%s:%s" .root.Values.image.repository (default .root.Chart.AppVersion .root.Values.image.tag) | quote }}
{{- end }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
env:
  # Serve's fast ingress: about a quarter of the CPU per token. Read when Ray starts, so the Serve config cannot set it.
  - name: RAY_SERVE_ENABLE_HA_PROXY
    value: "1"
  - name: RAY_SERVE_THROUGHPUT_OPTIMIZED
    value: "1"
  {{- if not (hasKey .root.Values.env "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S") }}
  # A change of the gateways reloads HAProxy; streams on the process before it get this long.
  - name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S
    value: "3600"
  {{- end }}
  {{- if not (hasKey .root.Values.env "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS") }}
  # A hung replica is killed at once; otherwise its GPUs are free only when its drain timeout is over.
  - name: RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS
    value: "1"
  {{- end }}
  # Whoever reaches Ray's ports can run code. With an operator too old for authOptions Ray then refuses to start.
  - name: RAY_AUTH_MODE
    value: token
  {{- if not (hasKey .root.Values.env "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S") }}
  # With few CPUs the proxies take longer to start than the 5 s that Serve gives them.
  - name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S
    value: "60"
  {{- end }}
  - name: RAY_USAGE_STATS_ENABLED
    value: "0"
  {{- with .root.Values.auth.apiKeysSecretName }}
  - name: CANTATA_GATEWAY__API_KEYS
    valueFrom:
      secretKeyRef:
        name: {{ . }}
        key: api_keys
  - name: CANTATA_GATEWAY__SECRET
    valueFrom:
      secretKeyRef:
        name: {{ . }}
        key: secret
        optional: true
  {{- end }}
  {{- with .root.Values.auth.stateSecretName }}
  - name: CANTATA_STATE__URL
    valueFrom:
      secretKeyRef:
        name: {{ . }}
        key: url
  {{- end }}
  {{- range $name, $value := .root.Values.env }}
  - name: {{ $name }}
    value: {{ $value | quote }}
  {{- end }}
{{- with .root.Values.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $resources := dict "cpu" (toString .node.resources.cpu) "memory" (toString .node.resources.memory) }}
{{- with .node.gpus }}
{{- $_ := set $resources $.root.Values.worker.gpuResource (toString .) }}
{{- end }}
resources:
  requests:
    {{- toYaml $resources | nindent 4 }}
  limits:
    {{- toYaml $resources | nindent 4 }}
securityContext:
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
volumeMounts:
  - name: model
    mountPath: /models
    readOnly: true
  - name: shared-memory
    mountPath: /dev/shm
  {{- with .root.Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
startupProbe:
  httpGet:
    path: /api/healthz
    port: 52365
  timeoutSeconds: 5
  {{- toYaml .root.Values.probes.startup | nindent 2 }}
livenessProbe:
  httpGet:
    path: /api/healthz
    port: 52365
  {{- toYaml .root.Values.probes.liveness | nindent 2 }}
{{- end -}}
