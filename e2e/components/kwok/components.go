//go:build components

// Package components names kwok, so that go.mod and go.sum pin every module it needs.
package components

import _ "sigs.k8s.io/kwok/cmd/kwok"
