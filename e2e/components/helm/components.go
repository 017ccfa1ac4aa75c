//go:build components

// Package components names helm, so that go.mod and go.sum pin every module it needs.
package components

import _ "helm.sh/helm/v3/cmd/helm"
