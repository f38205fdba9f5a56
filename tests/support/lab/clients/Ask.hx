// Posts $BODY to $URL twice, as the standard library's documentation has it.
class Ask {
    static function main() {
        sys.ssl.Socket.DEFAULT_CA = sys.ssl.Certificate.loadFile(Sys.getEnv("SSL_CERT_FILE"));
        for (n in 0...2) {
            var request = new haxe.Http(Sys.getEnv("URL"));
            request.setHeader("Content-Type", "application/json");
            request.setPostData(sys.io.File.getContent(Sys.getEnv("BODY")));
            request.onError = function(reason) throw reason;
            request.request(true);
        }
    }
}
