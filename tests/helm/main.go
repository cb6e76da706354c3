// Renders a chart as `helm template` does, by Helm's own loader, values and engine:
//
//	helm CHART RELEASE NAMESPACE KUBERNETES [VALUES.yaml]... -> manifests on stdout
package main

import (
	"fmt"
	"os"
	"sort"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
)

func main() {
	if err := render(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

func render(args []string) error {
	if len(args) < 4 {
		return fmt.Errorf("CHART RELEASE NAMESPACE KUBERNETES [VALUES.yaml]...")
	}
	chart, err := loader.Load(args[0])
	if err != nil {
		return err
	}
	values := map[string]any{}
	for _, name := range args[4:] {
		read, err := common.ReadValuesFile(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		// Of two files, the later one wins, key by key.
		values = util.CoalesceTables(read, values)
	}
	version, err := common.ParseKubeVersion(args[3])
	if err != nil {
		return err
	}
	capabilities := common.DefaultCapabilities.Copy()
	capabilities.KubeVersion = *version
	options := common.ReleaseOptions{Name: args[1], Namespace: args[2], Revision: 1, IsInstall: true}
	all, err := util.ToRenderValues(chart, values, options, capabilities)
	if err != nil {
		return err
	}
	files, err := engine.Render(chart, all)
	if err != nil {
		return err
	}
	names := make([]string, 0, len(files))
	for name := range files {
		if strings.TrimSpace(files[name]) != "" && !strings.HasSuffix(name, "NOTES.txt") && !strings.HasSuffix(name, ".tpl") {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	for _, name := range names {
		fmt.Printf("---\n# Source: %s\n%s\n", name, files[name])
	}
	return nil
}
