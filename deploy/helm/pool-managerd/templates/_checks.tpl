{{- /* What contradicts itself ends here, with a sentence that says what to change. */ -}}
{{- define "pm.checks" -}}
{{- $v := .Values -}}
{{- if and $v.api.expose (not $v.api.insecure) (not $v.auth.secretName) -}}
{{- fail "api.expose is true and auth.secretName is empty: everyone who reaches the API could do everything. Name a Secret with tokens, or set api.expose to false, or api.insecure to true." -}}
{{- end -}}
{{- if and $v.api.expose (not $v.api.insecure) (not $v.tls.secretName) -}}
{{- fail "api.expose is true and tls.secretName is empty: tokens would cross the network for everybody to read. Name a Secret with a certificate, or set api.insecure to true." -}}
{{- end -}}
{{- $needed := add $v.drain.preStopSeconds $v.drain.leaseSeconds 15 | int -}}
{{- if lt (int (include "pm.grace" .)) $needed -}}
{{- fail (printf "terminationGracePeriodSeconds is %s, and draining takes up to %d s (drain.preStopSeconds + drain.leaseSeconds + 15): raise it to %d, or leave it out." (include "pm.grace" .) $needed $needed) -}}
{{- end -}}
{{- if eq $v.kind "DaemonSet" -}}
{{- if ne $v.autoscaling.type "none" -}}
{{- fail (printf "autoscaling.type is %s and kind is DaemonSet, which has one pod on each node and no scale: set kind to StatefulSet or Deployment, or scale the nodes (deploy/kubernetes/node-scaling.yaml)." $v.autoscaling.type) -}}
{{- end -}}
{{- if $v.podDisruptionBudget.enabled -}}
{{- fail "podDisruptionBudget.enabled is true and kind is DaemonSet: drains of a node never evict its pods, so the budget would protect nothing. Set it to false, or kind to StatefulSet or Deployment." -}}
{{- end -}}
{{- if ne (int $v.replicas) 1 -}}
{{- fail "replicas is set and kind is DaemonSet, which has one pod on each node: leave replicas out, or set kind to StatefulSet or Deployment." -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.gpu.mode "all") (not $v.gpu.exclusiveNodes) -}}
{{- fail "gpu.mode is all, which asks the scheduler for no GPU, so it would give the same GPUs to other pods: set gpu.mode to request or claim, or, if taints keep other pods that ask for GPUs off these nodes, gpu.exclusiveNodes to true." -}}
{{- end -}}
{{- if and (eq $v.gpu.mode "claim") (semverCompare "<1.34.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "gpu.mode is claim and this cluster is %s: resource claims need Kubernetes 1.34. Set gpu.mode to request." .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and $v.gpu.migMonitor (ne $v.gpu.mode "all") -}}
{{- fail (printf "gpu.migMonitor is true and gpu.mode is %s: slices of others are seen only by who has every GPU. Set gpu.mode to all, or gpu.migMonitor to false." $v.gpu.mode) -}}
{{- end -}}
{{- if and (or $v.gpu.migMonitor $v.privileged) (ne (int $v.runAs.user) 0) -}}
{{- fail "gpu.migMonitor or privileged is true and runAs.user is not 0: the capability would not reach the process. Set runAs.user to 0." -}}
{{- end -}}
{{- range $name := list "state" "cache" -}}
{{- $volume := get $v $name -}}
{{- if and (eq $volume.type "hostPath") (ne (int $v.runAs.user) 0) (not $v.hostPathsPrepared) -}}
{{- fail (printf "%s.type is hostPath and runAs.user is %d: the kubelet makes %s for root alone. Make it on each node with that owner and set hostPathsPrepared to true, or use emptyDir or a claim, or set runAs.user to 0." $name (int $v.runAs.user) $volume.hostPath) -}}
{{- end -}}
{{- if and (eq $volume.type "persistentVolumeClaim") (not $volume.claimName) (ne $v.kind "StatefulSet") -}}
{{- fail (printf "%s.type is persistentVolumeClaim, %s.claimName is empty and kind is %s: name a claim, or set kind to StatefulSet, which makes one for each pod." $name $name $v.kind) -}}
{{- end -}}
{{- if and (eq $volume.type "persistentVolumeClaim") $volume.claimName (eq $v.kind "DaemonSet") (eq $name "state") -}}
{{- fail "state.claimName is set and kind is DaemonSet: two daemons never share a state directory. Set state.type to emptyDir or hostPath." -}}
{{- end -}}
{{- end -}}
{{- if and $v.hostNetwork $v.networkPolicy.enabled -}}
{{- fail "hostNetwork and networkPolicy.enabled are true: a policy does not hold for pods in the node's network. Set one of them to false." -}}
{{- end -}}
{{- if not $v.api.expose -}}
{{- if or $v.monitoring.podMonitor.enabled (ne $v.autoscaling.type "none") -}}
{{- fail "api.expose is false, so neither Prometheus nor KEDA reaches the API: set it to true, or monitoring.podMonitor.enabled to false and autoscaling.type to none." -}}
{{- end -}}
{{- end -}}
{{- if and (include "pm.auth" .) (not $v.readToken.secretName) (or $v.monitoring.podMonitor.enabled (and (eq $v.autoscaling.type "keda") (eq $v.autoscaling.trigger "metrics-api"))) -}}
{{- fail "the API asks for tokens and readToken.secretName is empty: name the Secret with a token of scope read for Prometheus and KEDA." -}}
{{- end -}}
{{- if gt (int $v.autoscaling.min) (int $v.autoscaling.max) -}}
{{- fail (printf "autoscaling.min is %d and autoscaling.max is %d: min is at most max." (int $v.autoscaling.min) (int $v.autoscaling.max)) -}}
{{- end -}}
{{- range $key, $instead := dict "listen" "api.expose and api.port" "probe_listen" "api.probePort" "socket" "" "state_dir" "state" "insecure" "api.insecure" "on_exit" "" "shutdown_deadline" "drain" "shutdown_drain" "drain.leaseSeconds" "profile" "" -}}
{{- if hasKey $v.config.node $key -}}
{{- fail (printf "config.node.%s is what the chart sets in a pod: %s" $key (ternary (printf "set %s instead." $instead) "leave it out." (ne $instead ""))) -}}
{{- end -}}
{{- end -}}
{{- if hasKey $v.config.models "cache_dir" -}}
{{- fail "config.models.cache_dir is what the chart sets in a pod: set cache instead." -}}
{{- end -}}
{{- if eq (default "nvml" $v.config.gpu.backend) "simulated" -}}
{{- fail "config.gpu.backend is simulated: simulated devices are for a machine's own loopback (pool-managerd demo). Leave it out." -}}
{{- end -}}
{{- $ids := list -}}
{{- range $v.config.pool -}}
{{- if .isolation -}}{{- if and .isolation.run_as (ne (int $v.runAs.user) 0) -}}
{{- fail (printf "the pool %s has isolation.run_as and runAs.user is not 0: only root may run engines as others. Leave run_as out, as a pod is a wall already." .id) -}}
{{- end -}}{{- end -}}
{{- $ids = append $ids .id -}}
{{- end -}}
{{- if and $v.startup.waitForPool (not (has $v.startup.waitForPool $ids)) -}}
{{- fail (printf "startup.waitForPool is %s, and config.pool has no such pool: the pod would never be ready. Name one of config.pool, or leave it empty." $v.startup.waitForPool) -}}
{{- end -}}
{{- end }}
