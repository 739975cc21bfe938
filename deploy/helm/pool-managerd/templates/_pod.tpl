{{- define "pm.volume" -}}
{{- /* name, volume, kind */ -}}
{{- if eq .volume.type "hostPath" }}
- name: {{ .name }}
  hostPath: { path: {{ .volume.hostPath | quote }}, type: DirectoryOrCreate }
{{- else if eq .volume.type "emptyDir" }}
- name: {{ .name }}
  emptyDir: { sizeLimit: {{ .volume.size | quote }} }
{{- else if .volume.claimName }}
- name: {{ .name }}
  persistentVolumeClaim: { claimName: {{ .volume.claimName | quote }} }
{{- end }}
{{- end }}

{{- define "pm.pod" -}}
{{- $v := .Values -}}
{{- $root := eq (int $v.runAs.user) 0 -}}
{{- /* A Secret's files belong to root: the group reads them where the user is another. */ -}}
{{- $mode := ternary 256 288 $root -}}
metadata:
  labels:
    {{- include "pm.selector" . | nindent 4 }}
    {{- with $v.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    kubectl.kubernetes.io/default-container: pool-managerd
    checksum/config: {{ include "pm.config" . | sha256sum }}
    {{- with $v.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  serviceAccountName: {{ include "pm.serviceAccount" . }}
  # The daemon asks the cluster nothing.
  automountServiceAccountToken: false
  # A Service of this name would put POOL_MANAGERD_PORT and its like into the environment.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "pm.grace" . }}
  {{- with $v.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.gpu.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $v.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- if $v.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  {{- if $v.gpu.hostPID }}
  hostPID: true
  {{- end }}
  securityContext:
    runAsUser: {{ int $v.runAs.user }}
    runAsGroup: {{ int $v.runAs.group }}
    runAsNonRoot: {{ not $root }}
    fsGroup: {{ int $v.runAs.group }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: { type: RuntimeDefault }
  containers:
    - name: pool-managerd
      image: {{ include "pm.image" . | quote }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      args: [serve, --config, /etc/pool-managerd/config/pool-managerd.toml]
      env:
        - { name: HOME, value: /var/lib/pool-managerd }
        - { name: XDG_RUNTIME_DIR, value: /run/pool-managerd }
        - { name: POOL_MANAGERD_SERVER, value: "unix:/run/pool-managerd/api.sock" }
        - name: NODE_NAME
          valueFrom: { fieldRef: { fieldPath: spec.nodeName } }
        - { name: NVIDIA_DRIVER_CAPABILITIES, value: "compute,utility" }
        {{- if eq $v.gpu.mode "all" }}
        - { name: NVIDIA_VISIBLE_DEVICES, value: all }
        {{- end }}
        {{- if $v.gpu.migMonitor }}
        - { name: NVIDIA_MIG_MONITOR_DEVICES, value: all }
        {{- end }}
        {{- with $v.extraEnv }}{{ toYaml . | nindent 8 }}{{ end }}
      ports:
        {{- if $v.api.expose }}
        - { name: api, containerPort: {{ int $v.api.port }}, protocol: TCP }
        {{- end }}
        - { name: probes, containerPort: {{ int $v.api.probePort }}, protocol: TCP }
      # All three tell of the daemon: engines come and go, and a pod that is ended for one would take the others with it.
      startupProbe:
        {{- if $v.startup.waitForPool }}
        exec:
          command: [pool-managerd, preload, {{ $v.startup.waitForPool | quote }}]
        timeoutSeconds: 9
        {{- else }}
        httpGet: { path: /startupz, port: probes }
        timeoutSeconds: 5
        {{- end }}
        periodSeconds: 10
        failureThreshold: {{ int $v.startup.failureThreshold }}
      livenessProbe:
        httpGet: { path: /livez, port: probes }
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        httpGet: { path: /readyz, port: probes }
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      lifecycle:
        preStop:
          # Endpoints forget the pod; then SIGTERM, at which the daemon drains.
          sleep: { seconds: {{ int $v.drain.preStopSeconds }} }
      securityContext:
        allowPrivilegeEscalation: {{ or $v.privileged $v.gpu.migMonitor }}
        privileged: {{ $v.privileged }}
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
          {{- if $v.gpu.migMonitor }}
          add: [SYS_ADMIN]
          {{- end }}
      {{- $resources := deepCopy $v.resources }}
      {{- if eq $v.gpu.mode "request" }}
      {{- $_ := set $resources "limits" (merge (dict $v.gpu.resourceName (int $v.gpu.count)) (default dict $resources.limits)) }}
      {{- else if eq $v.gpu.mode "claim" }}
      {{- $_ := set $resources "claims" (list (dict "name" "gpus")) }}
      {{- end }}
      resources: {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - { name: config, mountPath: /etc/pool-managerd/config, readOnly: true }
        {{- if include "pm.auth" . }}
        - { name: tokens, mountPath: /etc/pool-managerd/auth, readOnly: true }
        {{- end }}
        {{- if include "pm.tls" . }}
        - { name: tls, mountPath: /etc/pool-managerd/tls, readOnly: true }
        {{- end }}
        - { name: state, mountPath: /var/lib/pool-managerd }
        - { name: cache, mountPath: /var/cache/pool-managerd }
        - { name: run, mountPath: /run/pool-managerd }
        - { name: tmp, mountPath: /tmp }
        - { name: shm, mountPath: /dev/shm }
        {{- with $v.modelsHostPath }}
        - { name: local-models, mountPath: {{ . | quote }}, readOnly: true }
        {{- end }}
        {{- with $v.extraVolumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
    {{- with $v.extraContainers }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- if eq $v.gpu.mode "claim" }}
  resourceClaims:
    - name: gpus
      resourceClaimTemplateName: {{ include "pm.name" . }}
  {{- end }}
  volumes:
    - name: config
      configMap: { name: {{ include "pm.name" . }} }
    {{- if include "pm.auth" . }}
    - name: tokens
      secret: { secretName: {{ $v.auth.secretName }}, defaultMode: {{ $mode }} }
    {{- end }}
    {{- if include "pm.tls" . }}
    - name: tls
      secret: { secretName: {{ $v.tls.secretName }}, defaultMode: {{ $mode }} }
    {{- end }}
    {{- include "pm.volume" (dict "name" "state" "volume" $v.state) | trim | nindent 4 }}
    {{- include "pm.volume" (dict "name" "cache" "volume" $v.cache) | trim | nindent 4 }}
    - { name: run, emptyDir: { medium: Memory, sizeLimit: 64Mi } }
    - { name: tmp, emptyDir: {} }
    - { name: shm, emptyDir: { medium: Memory, sizeLimit: {{ $v.shmSize | quote }} } }
    {{- with $v.modelsHostPath }}
    - name: local-models
      hostPath: { path: {{ . | quote }}, type: Directory }
    {{- end }}
    {{- with $v.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $v.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $v.affinity }}
  affinity: {{- toYaml $v.affinity | nindent 4 }}
  {{- else if $v.gpuNodesOnly }}
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
          {{- range $key, $value := dict "feature.node.kubernetes.io/pci-10de.present" "true" "feature.node.kubernetes.io/pci-0302_10de.present" "true" "feature.node.kubernetes.io/pci-0300_10de.present" "true" "feature.node.kubernetes.io/cpu-model.vendor_id" "NVIDIA" "nvidia.com/gpu.present" "true" }}
          - matchExpressions:
              - { key: {{ $key }}, operator: In, values: [{{ $value | quote }}] }
          {{- end }}
  {{- end }}
{{- end }}
