// Prints where crypto/tls keeps a connection's configuration and the server's name in it.
package main

import (
	"crypto/tls"
	"fmt"
	"reflect"
)

func main() {
	config, _ := reflect.TypeOf(tls.Conn{}).FieldByName("config")
	name, _ := reflect.TypeOf(tls.Config{}).FieldByName("ServerName")
	fmt.Println(config.Offset, name.Offset)
}
