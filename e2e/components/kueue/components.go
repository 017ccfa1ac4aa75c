//go:build components

// Package components names Kueue, so that go.mod and go.sum pin every module it needs.
package components

import _ "sigs.k8s.io/kueue/cmd/kueue"
